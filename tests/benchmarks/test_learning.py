"""The learning benchmark: its figures, its tables, its pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.learning import __main__, pictures, report
from benchmarks.learning.runs import rise


def test_a_rise_is_told_in_standard_errors() -> None:
    found = rise([0.0, 2.0] * 5 + [9.0] * 40 + [4.0, 6.0] * 5)
    assert found["first"] == 1.0
    assert found["last"] == 5.0
    # Each ten have a variance of 10/9, so each mean one of 1/9.
    assert found["standard_errors"] == pytest.approx(4 / (2 / 9) ** 0.5)


def figure(mean: float) -> dict[str, float]:
    return {"mean": mean, "standard_error": 0.05}


RESULT: dict[str, Any] = {
    "curves": {
        "before": {"reward": figure(0.1), "grade": figure(1.9)},
        "trainers": {
            "GRPO": [
                {
                    "rewards": [0.1 * step for step in range(20)],
                    "first": 0.45,
                    "last": 1.45,
                    "standard_errors": 7.4,
                    "heldout": {"reward": figure(1.5), "grade": figure(2.4)},
                }
            ]
        },
    },
    "loop": {
        "fixed": [
            [{"round": 1, "grade": figure(grade), "reward": figure(0.9)}] for grade in (2.1, 2.2)
        ],
        "renewed": [
            [
                {
                    "round": 1,
                    "grade": figure(grade),
                    "reward": figure(0.7),
                    "reward_by_the_next": figure(0.6),
                    "num_pairs": 256,
                    "accuracy": figure(0.78),
                    "accuracy_of_the_next": figure(0.82),
                }
            ]
            for grade in (2.4, 2.5)
        ],
    },
}


def test_each_part_that_was_measured_has_a_table_and_a_picture(tmp_path: Path) -> None:
    tables = report.tables(RESULT)
    assert "| GRPO | 0.45 | 1.45 | 7.4 | 1.50 | 2.40 |" in tables
    assert "| 1 | 2.10, 2.20 | 0.90, 0.90 | 2.40, 2.50 | 0.70, 0.70 | 0.60, 0.60 |" in tables
    pictures.draw(RESULT, tmp_path)
    drawn = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert sorted(drawn) == ["learning-curves.png", "learning-loop.png"]
    pictures.draw(RESULT, tmp_path)
    assert drawn == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_what_is_no_demo_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        __main__.main(["--demo", str(tmp_path)])
    assert ended.value.code == 2
    assert "is not the output of `make demo`" in capsys.readouterr().err
