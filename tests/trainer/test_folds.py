"""Cross-validation by prompt: real trainings, and what they say together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trainer_runs import overrides, settings, write_pairs

from trainer.__main__ import main
from trainer.config.config_file import load_config
from trainer.config.train import TrainConfig
from trainer.data.prepare import prepare
from trainer.folds import _pooled, train_folds


def fold(accuracy: float, error: float, num_pairs: int) -> dict[str, Any]:
    lead = {"mean": 0.1, "low": 0.0, "high": 0.2, "stderr": error}
    return {
        "heldout_accuracy": accuracy,
        "heldout_accuracy_stderr": error,
        "heldout_num_pairs": num_pairs,
        "heldout_num_prompts": num_pairs // 10,
        "heldout_baselines": {"length": {"accuracy": accuracy - 0.1, "lead": lead}},
    }


def test_folds_add_up_as_independent_samples_do() -> None:
    random = np.random.default_rng(0)
    sizes = (100, 300, 100)
    found = _pooled([fold(0.8, 0.03, 100), fold(0.9, 0.02, 300), fold(0.7, 0.04, 100)])
    assert (found.num_pairs, found.num_prompts) == (500, 50)
    assert found.accuracy == pytest.approx((80 + 270 + 70) / 500)
    drawn = random.normal((0.8, 0.9, 0.7), (0.03, 0.02, 0.04), (20_000, 3))
    assert found.accuracy_stderr == pytest.approx((drawn @ sizes / 500).std(), rel=0.03)
    length = found.baselines["length"]
    assert length.accuracy == pytest.approx(found.accuracy - 0.1)
    assert (length.lead, length.lead_stderr) == (pytest.approx(0.1), found.accuracy_stderr)


def test_every_prompt_is_held_out_once(ray_cluster: str, base_model: Path, tmp_path: Path) -> None:
    data = write_pairs(tmp_path / "pairs.jsonl")
    changes = {"distributed__num_workers": 1, "training__max_steps": 3}
    config = load_config(None, overrides(settings(base_model, data, tmp_path / "runs", **changes)))
    said: list[str] = []
    found = train_folds(config, 2, said.append)
    assert json.loads((tmp_path / "runs" / "folds.json").read_text())["accuracy"] == found.accuracy
    assert (found.num_pairs, found.num_prompts) == (48, 48)
    assert set(found.baselines) == {"length", "bag of words"}
    rows = []
    for number in (1, 2):
        export = tmp_path / "runs" / f"fold-{number}" / "export"
        resolved = (export / "resolved_config.json").read_text(encoding="utf-8")
        prepared = prepare(TrainConfig.model_validate_json(resolved))[0]
        rows.append(set(prepared.heldout.rows.tolist()))
        assert rows[-1].isdisjoint(prepared.train.rows.tolist())
        card = (export / "README.md").read_text(encoding="utf-8")
        assert f"part {number}/2 of the prompts" in card
        assert "| bag of words |" in card
        assert 'id="baselines"' in (export / "report.html").read_text(encoding="utf-8")
    assert rows[0].isdisjoint(rows[1])
    assert len(rows[0] | rows[1]) == 48
    assert any(line.startswith(f"all folds: accuracy {found.accuracy:.4f} +- ") for line in said)
    assert "above bag of words" in said[-3]
    assert said[-2] == "warning: with fewer than 100 prompts this is a rough guess"
    assert said[-1].endswith("folds.json")
    assert any(line.startswith("baselines on the held-out pairs: length 0.") for line in said)
    assert sum(line.startswith(("fold 1: accuracy ", "fold 2: accuracy ")) for line in said) == 2
    assert sum(line.startswith("rows are read as chat: the tokenizer has a") for line in said) == 2
    again: list[str] = []
    assert train_folds(config, 2, again.append) == found
    assert again.count("this run is finished already; nothing to do") == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--folds", "1"], "error: --folds 1: there must be two at least"),
        (["--folds", "3", "--data.eval", "b.jsonl"], "error: --data.eval cannot be used with --"),
        (["--folds", "3", "--data.fold", "1/2"], "error: --data.fold cannot be used with --folds"),
        (["--folds", "3", "--evaluation.patience", "2", "--evaluation.every-steps", "9"],
         "error: --evaluation.patience cannot be used with --folds: it would end a training by"),
        (["--data.fold", "3/2"], "data.fold is '3/2': a fold is one of two or more, such as 2/5"),
        (["--data.fold", "1/1"], "data.fold is '1/1': a fold is one of two or more"),
        (["--data.fold", "half"], "data.fold is 'half': a fold is one of two"),
        (["--data.fold", "1/2", "--data.eval", "b.jsonl"],
         "error: --data.fold and --data.eval both say"),
    ],
)  # fmt: skip
def test_a_split_that_is_said_twice_or_is_none_is_refused(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--data.train", "a.jsonl", *options]) == 2
    assert message in capsys.readouterr().err
