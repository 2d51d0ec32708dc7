"""`training_log.jsonl`, a JSON line for each optimizer step, and `evaluations.jsonl`, one for each
held-out evaluation."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trainer.console import warn

LOG_FILE = "training_log.jsonl"
EVALUATIONS_FILE = "evaluations.jsonl"


class TrainingLog:
    """Appends to the log of a run that goes on after `step`; lines after it are removed.

    Lines for which a full disk has no room are kept, and written once there is some.
    """

    def __init__(self, path: Path, step: int) -> None:
        kept = 0
        for text in _lines(path):
            if json.loads(text)["step"] > step:
                break
            kept += len(text) + 1
        self._path = path
        self._file = path.open("ab", buffering=0)
        self._file.truncate(kept)
        self._waiting = b""

    def write(self, line: Mapping[str, Any]) -> None:
        had_room = not self._waiting
        self._waiting += (json.dumps(line) + "\n").encode()
        try:
            self._flush()
        except OSError as error:
            if had_room:
                warn(f"{self._path} cannot be written: {error}; its lines wait in memory")

    def close(self) -> None:
        """Raises OSError if there still is no room for lines that wait."""
        self._flush()
        self._file.close()

    def _flush(self) -> None:
        while self._waiting:
            written = self._file.write(self._waiting)
            self._waiting = self._waiting[written:]


def read_log(path: Path) -> Iterator[dict[str, Any]]:
    """The log's lines; a last one that a kill cut short is left out."""
    for text in _lines(path):
        yield json.loads(text)


def _lines(path: Path) -> list[bytes]:
    return path.read_bytes().split(b"\n")[:-1] if path.exists() else []
