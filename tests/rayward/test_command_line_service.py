"""`rayward score` through the service: the same file as without one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from score_files import ROWS, write

import rayward


def test_score_through_the_service_gives_the_same_file(
    service: str, export_dir: Path, tmp_path: Path
) -> None:
    source = write(tmp_path / "in.jsonl", ROWS)
    files = [tmp_path / "offline.jsonl", tmp_path / "served.jsonl"]
    for model, output in zip((str(export_dir), service), files, strict=True):
        assert rayward.main(["score", model, str(source), str(output)]) == 0
    offline, served = ([json.loads(row) for row in f.read_text().splitlines()] for f in files)
    for ours, theirs in zip(offline, served, strict=True):
        assert ours["rewards"] == pytest.approx(theirs["rewards"], abs=1e-5)
        assert ours["errors"] == theirs["errors"]
        assert ours["model_version"] == theirs["model_version"]
