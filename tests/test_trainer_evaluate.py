"""Pairwise evaluation: the numbers by hand, and a directory and its service giving the same."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from trainer_runs import write_pairs

from trainer.evaluate import evaluate_model, summarise

REWARDS = arrays(np.float32, (7,), elements=st.sampled_from([-1.5, 0.0, 0.25, 3.0]))


@given(REWARDS, REWARDS)
def test_the_summary_is_what_its_names_say(chosen, rejected):
    result = summarise(chosen, rejected)
    points = [1 if c > r else 0.5 if c == r else 0 for c, r in zip(chosen, rejected, strict=True)]
    assert result.num_pairs == 7
    assert result.accuracy == pytest.approx(sum(points) / 7)
    assert result.reward_margin == pytest.approx(float(np.mean(chosen - rejected)), abs=1e-6)
    assert result.min_reward <= result.mean_reward <= result.max_reward
    assert result.accuracy + summarise(rejected, chosen).accuracy == pytest.approx(1)


def test_no_pairs_are_refused():
    empty = np.empty(0, np.float32)
    with pytest.raises(ValueError, match="no pair"):
        summarise(empty, empty)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """30 pairs, and one each that is over-long or has equal sides."""
    path = write_pairs(tmp_path_factory.mktemp("eval") / "pairs.jsonl", 30)
    with path.open("a") as file:
        file.write(json.dumps({"prompt": "p", "chosen": "apple " * 400, "rejected": "a"}) + "\n")
        file.write(json.dumps({"prompt": "p", "chosen": "same", "rejected": "same"}) + "\n")
    return str(path)


def test_a_directory_is_evaluated(export_dir: Path, data: str):
    result = evaluate_model(str(export_dir), data, device="cpu", max_batch_tokens=64)
    assert (result["num_pairs"], result["num_dropped"]) == (30, 2)
    assert 0 <= result["accuracy"] <= 1
    assert result["model_version"].startswith("sha256:")
    assert json.loads(json.dumps(result)) == result
    larger = evaluate_model(str(export_dir), data, device="cpu")
    assert larger["mean_reward"] == pytest.approx(result["mean_reward"], abs=1e-5)


def test_a_service_gives_the_same_numbers(service: str, export_dir: Path, data: str):
    offline = evaluate_model(str(export_dir), data, device="cpu")
    served = evaluate_model(service, data)
    assert served["model_version"] == offline["model_version"]
    for key in ("num_pairs", "num_dropped", "accuracy"):
        assert served[key] == offline[key], key
    for key in ("reward_margin", "min_reward", "mean_reward", "max_reward"):
        assert served[key] == pytest.approx(offline[key], abs=1e-5)


def test_bad_data_and_bad_models_are_named(export_dir: Path, base_model: Path, data: str):
    with pytest.raises(ValueError, match=r"nowhere.jsonl does not exist"):
        evaluate_model(str(export_dir), "nowhere.jsonl")
    with pytest.raises(ValueError, match="no trained reward head"):
        evaluate_model(str(base_model), data)
