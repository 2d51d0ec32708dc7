"""The model card of an export: what it claims, and what the Hub reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from reports import CONTRACT, COUNTS, FACTS, config_of, plausible, tokenizer

from trainer.config.data import Source
from trainer.config.train import LossConfig, TrainConfig
from trainer.evaluation.metrics import compare_with_baselines, evaluate
from trainer.job import RunFacts
from trainer.report.card import model_card
from trainer.report.describe import last_part

CONFIG = config_of(Path("outputs/polite"))


def card_of(
    files: Sequence[str] = (),
    config: TrainConfig = CONFIG,
    facts: RunFacts = FACTS,
    **found: Any,
) -> str:
    return model_card(config, CONTRACT, facts, found, files)


def test_the_card_shows_what_is_known_and_links_the_report() -> None:
    held, rewards = plausible(tokenizer())
    result = evaluate(held, 2 * rewards, rewards)
    num_prompts = result.subsets["math & logic"].num_prompts
    card = card_of(["report.html", "plots/loss.png"], **result.as_dict())
    assert f"On 450 held-out pairs of {result.num_prompts} prompts" in card
    assert f"in {100 * result.accuracy:.1f} % (ties count half; 95 % interval " in card
    assert f"expected calibration error is {100 * result.calibration_error:.1f} %" in card
    margins = f"{result.reward_margin:.3f} (of the raw scores, before normalisation, "
    assert f"the mean difference of the rewards is {margins}{result.raw_margin:.3f})" in card
    assert f"Reward and length correlate by {result.length_correlation:+.2f}; the chosen" in card
    assert f"| math & logic | 150 | {num_prompts} |" in card
    assert r"| \<i\>chat\</i\> | 150 |" in card
    assert "![Loss by step](plots/loss.png)" in card
    assert "plots/margin.png" not in card  # not among the files
    assert "resampled by prompt);" in card
    assert f"({result.num_calibration_bins} of 10 bins have pairs)" in card
    assert "](report.html" not in card  # a pushed copy is without it
    pushing = CONFIG.model_copy(deep=True)
    pushing.report.push_report = True
    assert "(report.html#hardest)" in card_of(["report.html"], pushing, **result.as_dict())


def test_the_card_says_whether_the_model_is_better_than_simple_ones() -> None:
    held, rewards = plausible(tokenizer())
    beaten = compare_with_baselines(
        held, rewards, {"length": -held.lengths, "bag of words": rewards}
    )
    found = {name: asdict(one) for name, one in beaten.items()}
    card = card_of(**evaluate(held, rewards, rewards).as_dict(), baselines=found)
    (length, words) = (line for line in card.splitlines() if line.startswith(("| len", "| bag")))
    assert f"| {100 * beaten['length'].accuracy:.1f} % |" in length
    assert f"| {100 * beaten['length'].lead.mean:+.1f} (" in length
    assert length.endswith("points | better |")
    assert words.endswith("points | not shown to be better |")
    assert "| baseline, on the same pairs |" not in card_of(
        **evaluate(held, rewards, rewards).as_dict()
    )


def test_the_metadata_of_a_card_are_what_the_hub_reads() -> None:
    changed = CONFIG.model_copy(deep=True)
    changed.model.path = "some-lab/base-1B"
    changed.data.train = {"some-lab/preferences:train": Source.model_validate({})}
    held, rewards = plausible(tokenizer())
    result = evaluate(held, rewards, rewards)
    data = ModelCard(card_of(config=changed, **result.as_dict())).data
    assert data.base_model == "some-lab/base-1B"
    assert data.datasets == ["some-lab/preferences"]
    assert data.pipeline_tag == "text-classification"
    assert data.model_name == "polite"
    assert {e.metric_type: e.metric_value for e in data.eval_results} == {
        "accuracy": pytest.approx(result.accuracy, abs=1e-6),
        "log_loss": pytest.approx(result.log_loss, abs=1e-6),
        "calibration_error": pytest.approx(result.calibration_error, abs=1e-6),
    }


@pytest.mark.parametrize(
    ("given", "counts", "tags", "introduction"),
    [
        ({}, {"pairs": 9}, ["bradley-terry"], "Bradley-Terry on pairs:"),
        ({}, {"pairs": 9, "ties": 1}, ["rao-kupper"], "Rao-Kupper on pairs and ties:"),
        (
            {"ties": "davidson"},
            {"pairs": 9, "ties": 1, "rankings": 2},
            ["davidson", "plackett-luce"],
            "Davidson on pairs and ties and Plackett-Luce on rankings:",
        ),
        (
            {"attributes": {"kind": 0.5, "brief": -1.0}},
            {"single completions": 9},
            ["attribute-regression"],
            "regression of attributes:",
        ),
    ],
)
def test_the_card_says_what_the_model_was_trained_by(
    given: dict[str, Any], counts: dict[str, int], tags: list[str], introduction: str
) -> None:
    config = CONFIG.model_copy(deep=True)
    config.loss = LossConfig(label_smoothing=0.1, **given)
    config.adapter.rank = 8
    facts = replace(FACTS, counts={**COUNTS, "pairs": 0, **counts})
    card = card_of(config=config, facts=facts)
    assert ModelCard(card).data.tags == ["reward-model", *tags, "rayward"]
    assert f"A reward model trained by {introduction}" in card
    assert "label smoothing 0.1" in card
    assert "| adapter | LoRA of rank 8, alpha 32 |" in card
    assert "| evaluation set | 5.0 % of the prompts, which were not trained on |" in card
    for name, number in counts.items():
        assert f"{number} {name}" in card
    assert ("which of two completions" in card) is ("attributes" not in given)
    assert ("The reward is 0.5 kind + -1 brief." in card) is ("attributes" in given)


def test_the_card_claims_no_unseen_prompts_where_that_is_not_so() -> None:
    held, rewards = plausible(tokenizer())
    found = evaluate(held, rewards, rewards).as_dict()
    assert "about prompts that were not trained on" in card_of(**found)
    assert "was chosen on these pairs" not in card_of(**found)
    config = CONFIG.model_copy(deep=True)
    config.data.eval = {"/home/someone/held.jsonl": Source.model_validate({})}
    config.evaluation.patience = 2
    for num_shared in (0, 12, None):
        facts = replace(FACTS, num_shared_prompts=num_shared)
        card = card_of(config=config, facts=facts, **found)
        assert ("about prompts that were not trained on" in card) is (num_shared == 0)
        assert ("12 of their prompts were trained on as well" in card) is (num_shared == 12)
        assert "The checkpoint was chosen on these pairs" in card
        assert "| evaluation set | held.jsonl |" in card


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
        ("/home/ann/pairs.jsonl", "pairs.jsonl"),
        ("~/models/base/", "base"),
        ("s3://ann@bucket/runs/rm?region=eu&endpoint_override=http://10.0.0.1", "rm"),
        ("s3://bucket", ""),
    ],
)
def test_of_a_place_only_its_last_part_is_shown(name: str, shown: str) -> None:
    assert last_part(name) == shown


def test_a_card_without_held_out_pairs_claims_nothing() -> None:
    card = card_of()
    data = ModelCard(card).data
    assert "No pairs were held out, so nothing is known about its accuracy." in card
    assert data.eval_results is None
    assert data.base_model is None
    assert data.datasets is None  # a file here is no data set there
