"""The log of a training: resumed, cut short by a kill, on a full disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from disks import fill

from trainer.log import TrainingLog, read_log


def test_a_log_goes_on_after_a_step(tmp_path: Path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    log = TrainingLog(path, 2)
    log.write({"step": 3, "again": True})
    log.close()
    assert [json.loads(line) for line in path.open()] == [
        {"step": 1},
        {"step": 2},
        {"step": 3, "again": True},
    ]


def test_what_is_no_line_is_passed_over(tmp_path: Path):
    """A power cut leaves blocks of zeros; a full disk, half a line."""
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 1}\n' + bytes(9) + b'\n{"step": 2}\n{"ste\n{"step": 3}\n')
    assert [line["step"] for line in read_log(path)] == [1, 2, 3]
    log = TrainingLog(path, 2)
    log.write({"step": 3, "again": True})
    log.close()
    assert list(read_log(path)) == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]


LONG = "x" * 6000  # more than what is left of a page


@pytest.mark.process
def test_a_log_waits_for_room_on_a_full_disk(small_disk: Path, capfd):
    path = small_disk / "log.jsonl"
    log = TrainingLog(path, 0)
    log.write({"step": 1})
    ballast = fill(small_disk)
    log.write({"step": 2, "long": LONG})
    log.write({"step": 3})
    assert capfd.readouterr().err.count("its lines wait in memory") == 1
    ballast.unlink()
    log.write({"step": 4})
    log.close()
    assert [line["step"] for line in read_log(path)] == [1, 2, 3, 4]


@pytest.mark.process
def test_lines_that_find_no_room_to_the_end_are_told(small_disk: Path, capfd):
    path = small_disk / "log.jsonl"
    log = TrainingLog(path, 0)
    log.write({"step": 1})
    fill(small_disk)
    log.write({"step": 2, "long": LONG})
    log.write({"step": 3})
    log.close()
    assert capfd.readouterr().err.endswith("its last 2 lines are lost\n")
    assert [line["step"] for line in read_log(path)] == [1]
