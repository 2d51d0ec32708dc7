"""What an evaluation reads in the tests, and when two of its results are the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from trainer_runs import write_pairs

TOO_LONG = "apple " * 400


def add(path: Path, *rows: dict[str, Any]) -> str:
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return str(path)


def write_evaluated_pairs(folder: Path) -> str:
    """30 pairs, and one each that is over-long or has equal sides."""
    path = write_pairs(folder / "pairs.jsonl", 30)
    return add(
        path,
        {"prompt": "p", "chosen": TOO_LONG, "rejected": "a"},
        {"prompt": "p", "chosen": "same", "rejected": "same"},
    )


def write_rankings(folder: Path) -> str:
    """5 + 3 + 1 + 1 pairs and two labelled ties; and a ranking that is dropped."""
    return add(
        folder / "rankings.jsonl",
        {
            "prompt": "Name fruits.",
            "completions": ["None.", "Apples.", "Apples and pears.", "A pear, please."],
            "scores": [0, 1, 2, 1],
            "topic": "fruit",
        },
        {"prompt": "Name tools.", "completions": ["A pan.", "An egg.", "No."], "topic": "tools"},
        {
            "chosen": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hey"}],
            "rejected": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "No"}],
        },
        {"prompt_ids": [5, 9], "chosen_ids": [7, 8, 2], "rejected_ids": [8, 2]},
        {"prompt": "Name tools.", "chosen": "A pan.", "rejected": "A knife.", "tie": True},
        {"prompt": "Name tools.", "completions": ["A pan.", TOO_LONG, "No."], "topic": "tools"},
    )


def assert_same(served: dict[str, Any], offline: dict[str, Any]) -> None:
    """Counts and what is counted are equal, rewards to 1e-5."""
    assert served.keys() == offline.keys()
    for key in served.keys() - {"model", "seconds"}:
        if isinstance(served[key], float):
            assert served[key] == pytest.approx(offline[key], abs=1e-5), key
        elif isinstance(served[key], dict):
            assert_same(served[key], offline[key])
        elif key == "calibration_bins":
            for ours, theirs in zip(served[key], offline[key], strict=True):
                assert_same(ours, theirs)
        else:
            assert served[key] == offline[key], key
