"""`training_log.jsonl`, a JSON line for each optimizer step, and `evaluations.jsonl`, one for each
held-out evaluation. Standard library only."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

LOG_FILE = "training_log.jsonl"
EVALUATIONS_FILE = "evaluations.jsonl"


class TrainingLog:
    """Appends to the log of a run that goes on after `step`; lines after it are removed."""

    def __init__(self, path: Path, step: int) -> None:
        kept = [line for line in read_log(path) if line["step"] <= step]
        self._file = path.open("w", encoding="utf-8", buffering=1)
        for line in kept:
            self.write(line)

    def write(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")

    def close(self) -> None:
        self._file.close()


def read_log(path: Path) -> Iterator[dict[str, Any]]:
    """The log's lines; a last one that a kill cut short is left out."""
    if path.exists():
        for text in path.read_text(encoding="utf-8").split("\n")[:-1]:
            yield json.loads(text)
