"""The best checkpoint kept and a training that stops early, with real engines on one worker."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engines import OnWorkers, comparisons, settings, train_without_ray
from safetensors.numpy import load_file

from reward_actor.model.manifest import check_manifest
from trainer.checkpoints.manifest import survey
from trainer.checkpoints.storage import Storage
from trainer.data.comparisons import Comparison, Comparisons
from trainer.data.split import TrainingData
from trainer.report.hub import PRIVATE


def swapped(of: Comparisons) -> Comparisons:
    """The same pairs with the other side chosen: what is learned makes these worse."""
    items = []
    for number in range(len(of)):
        first, second = (of.sequence(i) for i in range(of.starts[number], of.starts[number + 1]))
        items.append(Comparison([second, first], (1.0, 0.0), str(number), row=number + 1))
    return Comparisons.of(items, ["swapped"])


def train_on_one(
    model: Path,
    output_dir: Path,
    num_steps: int,
    changes: dict[str, Any],
    data: Comparisons,
    heldout: Comparisons,
) -> Any:
    from reward_actor.model.inferred import contract_for
    from reward_actor.model.tokenizer import load_tokenizer
    from trainer.network.base_config import base_config

    config = settings(model, output_dir=output_dir, **changes)
    whole = TrainingData(data, heldout, (1.0,), 0, has_ties=False)
    contract = contract_for(load_tokenizer(model), base_config(str(model)), format="chat")
    return train_without_ray(config, contract, whole, num_steps)


def test_it_stops_early_and_exports_the_best_checkpoint(
    on_workers: OnWorkers, base_model: Path, tmp_path: Path
) -> None:
    kept = {
        "evaluation__every_steps": 2,
        "evaluation__metric": "log_loss",
        "evaluation__patience": 2,
        "evaluation__keep_best": True,
        "checkpoint__every_steps": 1,
        "optimizer__schedule": "constant",
    }
    stopped, best = tmp_path / "stopped", tmp_path / "best"
    data = comparisons()
    sets = data, swapped(data)
    result = on_workers(1, train_on_one, base_model, stopped, 20, kept, *sets)[0]
    lines = [json.loads(line) for line in (stopped / "evaluations.jsonl").open()]
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert lines[0]["log_loss"] < lines[1]["log_loss"] < lines[2]["log_loss"]
    assert result["num_steps"] == 2
    assert result["heldout_log_loss"] == pytest.approx(lines[0]["log_loss"], abs=1e-6)
    steps = {state.step for state in survey(Storage.at(str(stopped), "checkpoints")).states}
    assert steps == {2, 5, 6}, "the best one outlives the newest two"
    again = on_workers(1, train_on_one, base_model, stopped, 20, kept, *sets)[0]
    assert again == result, "the evaluations so far are known to a run that resumes"
    changes = {"optimizer__schedule": "constant"}
    on_workers(1, train_on_one, base_model, best, 2, changes, *sets)
    ours = load_file(stopped / "export" / "model.safetensors")
    for name, weight in load_file(best / "export" / "model.safetensors").items():
        assert (ours[name] == weight).all(), name


@pytest.mark.parametrize("asynchronous", [True, False])
def test_nothing_is_written_nor_selected_where_nothing_is_measured(
    on_workers: OnWorkers, base_model: Path, tmp_path: Path, asynchronous: bool
) -> None:
    data = comparisons()
    ties = replace(data, scores=np.ones_like(data.scores))
    changes = {
        "evaluation__every_steps": 1,
        "evaluation__patience": 1,
        "evaluation__asynchronous": asynchronous,
    }
    result = on_workers(1, train_on_one, base_model, tmp_path / "run", 3, changes, data, ties)[0]
    assert result["num_steps"] == 3
    assert not [key for key in result if key.startswith("heldout_")]
    assert (tmp_path / "run" / "evaluations.jsonl").read_text() == ""
    card = (tmp_path / "run" / "export" / "README.md").read_text()
    assert "nothing is known about its accuracy" in card


def test_attributes_alone_are_measured_by_the_errors_of_their_heads(
    on_workers: OnWorkers, base_model: Path, tmp_path: Path
) -> None:
    """The targets of the held-out rows are the opposite: what is learned makes them worse."""
    drawn = np.random.default_rng(3)
    items = [
        Comparison(
            [drawn.integers(3, 200, 12).tolist()], (0,), str(row), attributes=[(2.0, 1.0)], row=row
        )
        for row in range(1, 25)
    ]
    data = Comparisons.of(items, ["rated"], num_attributes=2)
    held = replace(data, attributes=data.attributes * np.float32([-1, np.nan]))
    changes = {
        "loss__attributes": "{kind: 0.75, brief: 0.25}",
        "evaluation__every_steps": 1,
        "evaluation__metric": "rmse_kind",
        "evaluation__patience": 2,
        "evaluation__keep_best": True,
        "optimizer__schedule": "constant",
    }
    run = tmp_path / "run"
    result = on_workers(1, train_on_one, base_model, run, 20, changes, data, held)[0]
    lines = [json.loads(line) for line in (run / "evaluations.jsonl").open()]
    assert [sorted(line) for line in lines] == [["rmse_kind", "step"]] * 3
    assert lines[0]["rmse_kind"] < lines[1]["rmse_kind"] < lines[2]["rmse_kind"]
    step, beside = on_workers(1, evaluated_beside, base_model, run, changes, held)[0]
    alone = {line["step"]: line["rmse_kind"] for line in lines}
    assert beside == {"rmse_kind": pytest.approx(alone[step], abs=1e-5)}
    assert result["num_steps"] == 1
    assert result["heldout_rmse_kind"] == pytest.approx(lines[0]["rmse_kind"], abs=1e-5)
    card = (run / "export" / "README.md").read_text()
    assert "trained by regression of attributes:" in card
    assert "The reward is 0.75 kind + 0.25 brief." in card
    assert f"errors on held-out completions: kind {result['heldout_rmse_kind']:.3f}." in card
    assert "The checkpoint was chosen on these completions" in card
    assert "error of kind" in (run / "export" / "report.html").read_text()
    check_what_is_pushed(run / "export", [base_model, tmp_path])


def evaluated_beside(model: Path, run: Path, changes: dict[str, Any], heldout: Comparisons) -> Any:
    """What a Ray task for the run's newest checkpoint would give, without Ray."""
    import trainer.evaluation.background as validation
    from trainer.checkpoints.manifest import survey
    from trainer.checkpoints.storage import checkpoint_storage

    config = settings(model, output_dir=run, **changes)
    state = survey(checkpoint_storage(config)).states[0]
    data = TrainingData(heldout, heldout, (1.0,), 0, has_ties=False)
    found, validation.ray.get_gpu_ids = validation.ray.get_gpu_ids, list
    try:
        return state.step, validation.evaluate_checkpoint(config, state, data)
    finally:
        validation.ray.get_gpu_ids = found


def check_what_is_pushed(export: Path, secret: list[Path]) -> None:
    """A copy without what `trainer.report.hub` withholds loads, and names no local directory."""
    copy = shutil.copytree(export, export.with_name("pushed"))
    for name in PRIVATE:
        (copy / name).unlink()
    check_manifest(copy)
    for file in copy.rglob("*.*"):
        content = file.read_bytes()
        assert not [path for path in secret if str(path).encode() in content], file
    assert str(secret[0]) in (export / "resolved_config.json").read_text()
    assert not any(str(path) in (export / "report.html").read_text() for path in secret)
    for link in re.findall(r"\]\(([^)]+)\)", (copy / "README.md").read_text()):
        assert (copy / link).exists(), link
