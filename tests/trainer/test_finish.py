"""What a training's end says of its held-out scores."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from trainer.finish import held_out
from trainer.run import _step_warnings

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


@pytest.mark.parametrize(
    ("num_used", "batch", "expected"),
    [(65, 64, None), (64, 64, "is all of the 64 pairs"), (30, 64, "is larger than the 30 pairs")],
)
def test_an_epoch_of_one_step_is_told_before_it(
    num_used: int, batch: int, expected: str | None
) -> None:
    told = _step_warnings(num_used, batch)
    assert len(told) == (expected is not None)
    for warning in told:
        assert expected is not None
        assert f"training.global_batch_pairs 64 {expected} of an epoch" in warning
        assert warning.endswith(f"such as {num_used // 20}")
