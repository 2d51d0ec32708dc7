"""The model card of an export: what it claims, and what the Hub reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from reports import CONTRACT, FACTS, config_of, plausible, tokenizer

from trainer.card import model_card
from trainer.config import TrainConfig
from trainer.data_config import Source
from trainer.metrics import evaluate

CONFIG = config_of(Path("outputs/polite"))


def card_of(files: Sequence[str] = (), config: TrainConfig = CONFIG, **found: Any) -> str:
    facts = {**FACTS, **{f"heldout_{key}": value for key, value in found.items()}}
    return model_card(config, CONTRACT, facts, files)


def test_the_card_shows_what_is_known_and_links_the_report() -> None:
    held, rewards = plausible(tokenizer())
    result = evaluate(held, rewards)
    card = card_of(["report.html", "plots/loss.png"], **result.as_dict())
    assert "On 450 held-out pairs" in card
    assert f"in {100 * result.accuracy:.1f} % (ties count half; 95 % interval " in card
    assert f"expected calibration error is {100 * result.calibration_error:.1f} %" in card
    assert f"Reward and length correlate by {result.length_correlation:+.2f}; the chosen" in card
    assert "| math & logic | 150 |" in card
    assert r"| \<i\>chat\</i\> | 150 |" in card
    assert "![Loss by step](plots/loss.png)" in card
    assert "plots/margin.png" not in card  # not among the files
    assert "(report.html#hardest)" in card


def test_the_metadata_of_a_card_are_what_the_hub_reads() -> None:
    changed = CONFIG.model_copy(deep=True)
    changed.model.path = "some-lab/base-1B"
    changed.data.train = {"some-lab/preferences:train": Source.model_validate({})}
    result = evaluate(*plausible(tokenizer()))
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


def test_a_card_without_held_out_pairs_claims_nothing() -> None:
    card = card_of()
    data = ModelCard(card).data
    assert "No pairs were held out, so nothing is known about its accuracy." in card
    assert data.eval_results is None
    assert data.base_model is None
    assert data.datasets is None  # a file here is no data set there
