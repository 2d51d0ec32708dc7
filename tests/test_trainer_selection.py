"""The best checkpoint kept and a training that stops early, with real engines on one worker."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from engines import comparisons, on_workers, settings
from safetensors.numpy import load_file

from trainer.comparisons import Comparison, Comparisons
from trainer.config import EvaluationConfig
from trainer.saved import saved_states
from trainer.selection import Selection
from trainer.storage import Storage


def swapped(of: Comparisons) -> Comparisons:
    """The same pairs with the other side chosen: what is learned makes these worse."""
    items = []
    for number in range(len(of)):
        first, second = (of.sequence(i) for i in range(of.starts[number], of.starts[number + 1]))
        items.append(Comparison([second, first], (1.0, 0.0), str(number), row=number + 1))
    return Comparisons.of(items, ["swapped"])


def train_on_one(model: Path, output_dir: Path, num_steps: int, changes: dict[str, Any]) -> Any:
    """The whole loop of a training, without Ray, which would only carry the data to it."""
    import trainer.loop as loop
    from reward_actor.checkpoint import load_tokenizer
    from reward_actor.render import contract_for
    from trainer.network import base_config
    from trainer.prepare import TrainingData

    config = settings(model, output_dir=output_dir, **changes)
    data = comparisons()
    whole = TrainingData(data, swapped(data), (1.0,), 0, has_ties=False)
    contract = contract_for(load_tokenizer(model), base_config(str(model)), format="chat")
    output_dir.mkdir(parents=True)
    facts = {"num_pairs": len(data), "num_dropped": 0, "dropped": "none"}
    found, loop.ray.get = loop.ray.get, lambda given: given
    try:
        return loop.train(loop.Job(config, contract, whole, num_steps, facts))  # type: ignore[arg-type]
    finally:
        loop.ray.get = found


def test_it_stops_early_and_exports_the_best_checkpoint(base_model: Path, tmp_path: Path) -> None:
    kept = {
        "evaluation__every_steps": 2,
        "evaluation__metric": "log_loss",
        "evaluation__patience": 2,
        "evaluation__keep_best": True,
        "checkpoint__every_steps": 1,
        "optimizer__schedule": "constant",
    }
    stopped, best = tmp_path / "stopped", tmp_path / "best"
    result = on_workers(1, train_on_one, base_model, stopped, 20, kept)[0]
    lines = [json.loads(line) for line in (stopped / "evaluations.jsonl").open()]
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert lines[0]["log_loss"] < lines[1]["log_loss"] < lines[2]["log_loss"]
    assert result["num_steps"] == 2
    assert result["heldout_log_loss"] == pytest.approx(lines[0]["log_loss"], abs=1e-6)
    steps = {state.step for state in saved_states(Storage.at(str(stopped), "checkpoints"))}
    assert steps == {2, 5, 6}, "the best one outlives the newest two"
    changes = {"optimizer__schedule": "constant"}
    on_workers(1, train_on_one, base_model, best, 2, changes)
    ours = load_file(stopped / "export" / "model.safetensors")
    for name, weight in load_file(best / "export" / "model.safetensors").items():
        assert (ours[name] == weight).all(), name


def test_the_first_of_equal_evaluations_is_the_best() -> None:
    config = EvaluationConfig(every_steps=1, metric="accuracy", patience=2, keep_best=True)
    selection = Selection(config)
    assert selection.add(1, {"accuracy": 0.5})
    assert not selection.add(2, {"accuracy": 0.5})
    assert not selection.is_exhausted
    assert selection.add(3, {"accuracy": 0.6})
    assert not selection.add(4, {})
    assert not selection.add(5, {"accuracy": 0.6})
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
