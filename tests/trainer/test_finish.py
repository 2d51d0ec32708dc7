"""What a training's end says of its held-out scores."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from trainer.finish import held_out
from trainer.run import _accuracy_lines

scores = arrays(np.float32, st.integers(1, 300), elements=st.floats(-1e6, 1e6, width=32))


@given(scores, st.data())
def test_the_distribution_of_any_scores_is_one(raw_scores: np.ndarray, data: st.DataObject) -> None:
    lengths = data.draw(arrays(np.int64, len(raw_scores), elements=st.integers(1, 9)))
    found = held_out(raw_scores, lengths)
    assert found is not None  # and what it holds was checked
    assert found.num_scores == len(raw_scores)
    assert found.quantiles[0] == raw_scores.min()
    assert found.quantiles[100] == raw_scores.max()
    assert found.quantiles[50] == pytest.approx(np.median(raw_scores.astype(np.float64)))


def test_a_reward_that_is_the_length_correlates_with_it() -> None:
    lengths = np.arange(1, 50)
    for sign in (1, -1):
        found = held_out((sign * lengths).astype(np.float32), lengths)
        assert found is not None
        assert found.length_correlation == pytest.approx(sign)
    constant = held_out(np.ones(49, np.float32), lengths)
    assert constant is not None
    assert constant.length_correlation is None


@pytest.mark.parametrize("raw_scores", [[], [1.0, float("nan")]])
def test_nothing_is_said_of_what_cannot_be_measured(raw_scores: list[float]) -> None:
    assert held_out(np.array(raw_scores, np.float32), np.ones(len(raw_scores), np.int64)) is None


def test_the_end_tells_the_accuracy_of_runs_that_have_one() -> None:
    assert _accuracy_lines({}) == []
    older = {"heldout_accuracy": 0.9, "heldout_accuracy_low": 0.8, "heldout_accuracy_high": 1.0}
    assert _accuracy_lines(older) == []  # of a version that counted no prompts
    found = {**older, "heldout_num_pairs": 3_000, "heldout_num_prompts": 40}
    lead = {"mean": 0.1, "low": -0.1, "high": 0.3}
    found["heldout_baselines"] = {"length": {"accuracy": 0.8, "lead": lead}}
    assert _accuracy_lines(found) == [
        "held-out accuracy 0.9000 (0.8000 to 1.0000) on 3,000 pairs of 40 prompts",
        "  +0.1000 (-0.1000 to +0.3000) above length (0.8000)",
    ]
