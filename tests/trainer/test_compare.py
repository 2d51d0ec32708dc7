"""`rayward compare`: two models on the same comparisons, by the function and by the command."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluation_files import TOO_LONG, add, write_rankings
from exports import from_pretrained, make_export

import rayward
from reward_actor import Group, RewardScorer
from trainer.config.data import Columns
from trainer.evaluation.compare import ModelComparison, ModelResult, compare_models
from trainer.evaluation.evaluate import evaluate_model
from trainer.evaluation.intervals import Estimate

ROWS = [
    {"prompt": f"Name {i % 7} fruits.", "chosen": f"Apple {i}, pear.", "rejected": "No. " * (i + 1)}
    for i in range(20)
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("compare") / "pairs.jsonl"
    equal = {"prompt": "Hi", "chosen": "Hey", "rejected": "Hey"}
    return add(file, *ROWS, {**ROWS[0], "chosen": TOO_LONG}, equal)


@pytest.fixture(scope="module")
def other(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of other random weights, so that it decides some pairs the other way."""
    return str(make_export(base_model, tmp_path_factory.mktemp("other") / "export", seed=5))


def test_a_model_is_as_good_as_itself(export_dir: Path, data: str) -> None:
    found = compare_models(str(export_dir), str(export_dir), data, device="cpu")
    assert (found.num_pairs, found.num_prompts, found.a.num_dropped) == (20, 7, 2)
    assert found.a == found.b
    assert found.difference.mean == 0
    assert found.difference.low < 0 < found.difference.high
    assert found.agreement == 1
    assert found.rank_correlation == pytest.approx(1)
    assert (found.better, found.most_different) == (None, ())
    assert found.a.errors == {"too_long": 1}
    assert any("about 7 prompts" in warning for warning in found.warnings)
    alone = evaluate_model(str(export_dir), data, device="cpu")
    assert found.a.accuracy == alone["accuracy"]
    assert found.a.model_version == alone["model_version"]


def test_the_numbers_are_those_of_both_models_rewards(
    export_dir: Path, other: str, data: str
) -> None:
    found = compare_models(str(export_dir), other, data, device="cpu", num_shown=5)
    groups = [Group(row["prompt"], [row["chosen"], row["rejected"]]) for row in ROWS]
    raw = [
        np.array([s.raw_scores for s in from_pretrained(Path(model)).score(groups)], dtype=float)
        for model in (str(export_dir), other)
    ]
    ahead_a, ahead_b = (r[:, 0] > r[:, 1] for r in raw)
    assert found.a.accuracy == ahead_a.mean()
    assert found.b.accuracy == ahead_b.mean()
    assert found.difference.mean == pytest.approx(ahead_b.mean() - ahead_a.mean())
    assert 0 < found.agreement == (ahead_a == ahead_b).mean() < 1
    centred = [r - r.mean(axis=1, keepdims=True) for r in raw]
    ranks_a, ranks_b = (r.ravel().argsort().argsort() for r in centred)
    assert found.rank_correlation == pytest.approx(np.corrcoef(ranks_a, ranks_b)[0, 1])
    margin_a, margin_b = ((r[:, 0] - r[:, 1]) / r.std() for r in raw)
    order = np.argsort(-np.abs(margin_a - margin_b), kind="stable")[:5]
    assert [pair.row for pair in found.most_different] == (order + 1).tolist()
    first = found.most_different[0]
    assert first.margin_a == pytest.approx(margin_a[order[0]], abs=1e-3)
    assert first.margin_b == pytest.approx(margin_b[order[0]], abs=1e-3)
    assert (first.prompt, first.chosen) == tuple(ROWS[order[0]][k] for k in ("prompt", "chosen"))


def test_rankings_and_token_ids_are_compared(export_dir: Path, other: str, tmp_path: Path) -> None:
    found = compare_models(
        str(export_dir), other, write_rankings(tmp_path), device="cpu", num_shown=100
    )
    assert len(found.most_different) == found.num_pairs == 10
    (ids,) = [pair for pair in found.most_different if pair.prompt is None]
    assert (ids.chosen, ids.rejected) == (None, None)
    messages = [pair for pair in found.most_different if pair.prompt == "user: Hi"]
    assert [(pair.chosen, pair.rejected) for pair in messages] == [("Hey", "No")]


def test_the_command_prints_json_or_a_verdict(
    export_dir: Path, other: str, data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["compare", str(export_dir), other, data, "--device", "cpu", "--show", "3"]
    assert rayward.main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["difference"]["num_prompts"] == found["num_prompts"] == 7
    assert len(found["most_different"]) == 3
    assert rayward.main(command) == 0
    printed = capsys.readouterr()
    text = " ".join(printed.out.split())
    assert f"B is ahead of A by {found['difference']['mean']:+.4f}" in text
    assert f"{found['agreement']:.1%} of the pairs alike; rank correlation of the rew" in text
    ahead = found["difference"]
    better = "B" if ahead["low"] > 0 else "A" if ahead["high"] < 0 else None
    assert found["better"] == better
    assert (f"{better} is better" if better else "neither is shown to be better") in text
    assert "warning: the 20 held-out pairs or rankings are about 7 prompts: with" in printed.err


def test_one_model_is_in_memory_at_a_time(
    export_dir: Path, other: str, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[weakref.ref[RewardScorer]] = []
    load = RewardScorer.from_pretrained

    def watched(*args: Any, **options: Any) -> RewardScorer:
        gc.collect()
        assert not [one for one in loaded if one() is not None]
        scorer = load(*args, **options)
        loaded.append(weakref.ref(scorer))
        return scorer

    monkeypatch.setattr(RewardScorer, "from_pretrained", watched)
    compare_models(str(export_dir), other, data, device="cpu")
    assert len(loaded) == 2


@pytest.mark.parametrize(("low", "high", "better"), [(0.1, 0.2, "B"), (-0.2, -0.1, "A")])
def test_the_better_one_is_named(low: float, high: float, better: str) -> None:
    one = ModelResult("m", "v", 0, {}, 0.5, 0.4, 0.6)
    lead = Estimate((low + high) / 2, low, high, 0.02, 200)
    found = ModelComparison(one, one, 300, 200, lead, 0.9, 0.5, (), "d", (), 1.0)
    assert found.better == found.as_dict()["better"] == better


def test_what_cannot_be_compared_is_refused(
    export_dir: Path, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = "http://127.0.0.1:1"
    assert rayward.main(["compare", url, url, data, "--device", "cpu"]) == 2
    assert "device cannot be chosen here" in capsys.readouterr().err
    model = str(export_dir)
    assert rayward.main(["compare", model, model, data, "--show", "-1"]) == 2
    assert "--show is -1; give 0 or more" in capsys.readouterr().err
    long = add(tmp_path / "long.jsonl", {**ROWS[0], "chosen": TOO_LONG})
    assert rayward.main(["compare", model, model, long, "--device", "cpu"]) == 2
    assert "that both can score: " + model + " drops 1 rows (1 too_long)" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"margin_column: no row of .* has a column 'strength'"):
        compare_models(
            str(export_dir), str(export_dir), data, columns=Columns(margin_column="strength")
        )
