"""`training_log.jsonl`, a JSON line for each optimizer step, and `evaluations.jsonl`, one for each
held-out evaluation."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from reward_actor.terminal import warn

LOG_FILE = "training_log.jsonl"
EVALUATIONS_FILE = "evaluations.jsonl"


class TrainingLog:
    """Appends to the log of a run that goes on after `step`; lines after it are removed.

    Lines for which a full disk has no room are kept, and written once there is some.
    """

    def __init__(self, path: Path, step: int) -> None:
        kept = 0
        for text in _lines(path):
            line = parsed(text)
            if line is not None and line["step"] > step:
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
        """Lines for which there still is no room are lost, which is told."""
        try:
            self._flush()
        except OSError as error:
            num_lost = self._waiting.count(b"\n")
            warn(f"{self._path} cannot be written: {error}; its last {num_lost} lines are lost")
        self._file.close()

    def _flush(self) -> None:
        while self._waiting:
            written = self._file.write(self._waiting)
            self._waiting = self._waiting[written:]


def read_log(path: Path) -> Iterator[dict[str, Any]]:
    """The log's lines but those that are none, which a kill or a power cut may leave."""
    for text in _lines(path):
        if (line := parsed(text)) is not None:
            yield line


def parsed(text: bytes) -> dict[str, Any] | None:
    """A line of a log, None for what is none."""
    try:
        values = json.loads(text)
    except ValueError:
        return None
    return values if isinstance(values, dict) and isinstance(values.get("step"), int) else None


def _lines(path: Path) -> list[bytes]:
    return path.read_bytes().split(b"\n")[:-1] if path.exists() else []
