"""Runs with trackers, and what they log."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from log_lines import step_line

from trainer.config.config_file import load_config
from trainer.config.train import TrainConfig
from trainer.report.progress import Line


def config_of(output_dir: Path, trackers: Sequence[str]) -> TrainConfig:
    output_dir.mkdir(exist_ok=True)
    return load_config(
        None,
        [
            ("data.train", "pairs.jsonl"),
            ("output_dir", str(output_dir)),
            ("report.trackers", json.dumps(trackers)),
            ("report.project", "tests"),
        ],
    )


def steps(first: int, last: int) -> list[Line]:
    return [Line("train", step_line(step)) for step in range(first, last + 1)]
