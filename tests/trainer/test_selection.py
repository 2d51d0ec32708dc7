"""The best checkpoint: what it can be chosen by, and when a training has waited long enough."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trainer.config.train import EvaluationConfig
from trainer.evaluation.selection import Selection


def pair(row: int, **more: Any) -> dict[str, Any]:
    return {"prompt": f"What is {row}?", "chosen": "A number.", "rejected": "No.", **more}


def rated(row: int) -> dict[str, Any]:
    return {"prompt": f"What is {row}?", "completion": "A number.", "attributes": {"kind": row}}


@pytest.mark.parametrize(
    ("given", "rows", "complaint"),
    [
        ({"data.eval_fraction": 0}, pair, "accuracy of what is held out, but nothing is held out"),
        ({}, lambda row: pair(row, tie=True), "held-out rows prefers one completion to another"),
        ({"loss.attributes": "{kind: 1}"}, rated, "held-out rows prefers one"),
        ({"evaluation.metric": "accuracy_shorter"}, pair, "rows prefers a shorter completion"),
        (
            {"loss.attributes": "{kind: 1}", "evaluation.metric": "rmse_kind"},
            lambda row: pair(row) if row % 8 else rated(row),
            "held-out rows has that attribute",
        ),
    ],
    ids=["nothing", "ties", "attributes", "shorter", "no-attributes"],
)
@pytest.mark.parametrize("setting", ["patience", "keep_best"])
def test_checkpoints_cannot_be_compared_by_what_is_not_held_out(
    base_model: Path, tmp_path: Path, setting: str, given: dict[str, Any], rows: Any, complaint: str
) -> None:
    from trainer.config.config_file import load_config
    from trainer.run import train

    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps(rows(row)) + "\n" for row in range(1, 25))
    )
    settings = {
        "model.path": base_model,
        "data.train": tmp_path / "rows.jsonl",
        "output_dir": tmp_path / "run",
        "evaluation.every_steps": 1,
        f"evaluation.{setting}": 1 if setting == "patience" else "true",
        **given,
    }
    config = load_config(None, [(key, str(value)) for key, value in settings.items()])
    with pytest.raises(ValueError, match=f"evaluation.{setting} compares .*{complaint}"):
        train(config, say=lambda _: None)


def test_the_first_of_equal_evaluations_is_the_best() -> None:
    config = EvaluationConfig(every_steps=1, metric="accuracy", patience=2, keep_best=True)
    selection = Selection(config)
    assert selection.add(1, {"accuracy": 0.5})
    assert not selection.add(2, {"accuracy": 0.5})
    assert not selection.is_exhausted
    assert selection.add(3, {"accuracy": 0.6})
    assert not selection.add(4, {})
    assert not selection.add(5, {"accuracy": 0.6})
    assert not selection.is_exhausted, "what is not defined is not worse"
    assert not selection.add(6, {"accuracy": 0.6})
    assert selection.is_exhausted
    assert selection.best_step == 3


def test_a_resumed_run_knows_what_was_best() -> None:
    config = EvaluationConfig(every_steps=1, metric="log_loss", patience=3)
    before = [{"step": step, "log_loss": loss} for step, loss in [(1, 0.6), (2, 0.4), (3, 0.5)]]
    selection = Selection(config, before)
    assert selection.best_step == 2
    assert not selection.add(4, {"log_loss": 0.45})
    assert not selection.is_exhausted
    assert not selection.add(5, {"log_loss": 0.45})
    assert selection.is_exhausted
