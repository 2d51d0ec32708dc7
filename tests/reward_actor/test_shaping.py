"""What becomes of rewards before a policy is trained on them."""

from __future__ import annotations

import math
from statistics import fmean, stdev

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from reward_actor.shaping import (
    STD_FLOOR,
    clipped,
    decoupled_advantages,
    group_advantages,
    missing_eos_penalty,
    overlong_penalty,
    weighted_sum,
)

NAN = math.nan
Tables = arrays(
    np.float64,
    array_shapes(min_dims=2, max_dims=2, max_side=5),
    elements=st.floats(-5, 5) | st.just(NAN),
)


def test_rewards_are_clipped() -> None:
    found = clipped([[-9.0, 0.5], [NAN, 9.0]], -1, 1)
    np.testing.assert_array_equal(found, [[-1, 0.5], [NAN, 1]])
    np.testing.assert_array_equal(clipped([-9.0, 9.0]), [-9, 9])
    with pytest.raises(ValueError, match="low is 1 and high is 0"):
        clipped([0.0], 1, 0)


def test_overlong_completions_are_punished_by_their_length() -> None:
    """The example of DAPO, section 3.4: 16,384 expected tokens and a buffer of 4,096."""
    found = overlong_penalty([0, 16384, 18432, 20480, 30000], 20480, 4096)
    np.testing.assert_allclose(found, [0, 0, -0.5, -1, -1])
    for buffer in (0, 101):
        with pytest.raises(ValueError, match=rf"buffer_tokens is {buffer}; it must be in 1\.\.100"):
            overlong_penalty([1], 100, buffer)


def test_a_completion_that_was_cut_costs_its_penalty() -> None:
    found = missing_eos_penalty([1.0, 1.0, NAN], [True, False, False], 2.5)
    np.testing.assert_array_equal(found, [1, -1.5, NAN])
    with pytest.raises(ValueError, match="penalty is -1"):
        missing_eos_penalty([1.0], [True], -1)


def test_named_rewards_are_summed_by_their_weights() -> None:
    rewards = {"helpful": [1.0, NAN, NAN], "short": [2.0, 3.0, NAN]}
    np.testing.assert_array_equal(weighted_sum(rewards), [3, 3, NAN])
    np.testing.assert_array_equal(weighted_sum(rewards, {"short": -0.5}), [0, -1.5, NAN])
    with pytest.raises(ValueError, match="weights has 'long'; the rewards are helpful, short"):
        weighted_sum(rewards, {"long": 1.0})
    with pytest.raises(ValueError, match="no rewards"):
        weighted_sum({})


@given(Tables)
def test_advantages_are_of_the_group_without_those_that_have_no_reward(
    rewards: np.ndarray,
) -> None:
    plain = group_advantages(rewards, over_std=False)
    normalized = group_advantages(rewards, over_std=True)
    for row, advantages, over_std in zip(rewards, plain, normalized, strict=True):
        known = [reward for reward in row if not math.isnan(reward)]
        mean = fmean(known) if known else NAN
        scale = (stdev(known) if len(known) > 1 else 0) + STD_FLOOR
        np.testing.assert_allclose(advantages, row - mean, atol=1e-9)
        np.testing.assert_allclose(over_std, (row - mean) / scale, atol=1e-6)


def test_decoupled_rewards_keep_apart_what_their_sum_confuses() -> None:
    """GDPO, figure 2: in a group of two, one reward more than the other completion, and both more,
    come to the same advantage by their normalized sum."""
    accuracy, format = [[0.0, 1.0], [0.0, 1.0]], [[0.0, 0.0], [0.0, 1.0]]
    both = {"accuracy": accuracy, "format": format}
    summed = group_advantages(weighted_sum(both), over_std=True)
    assert summed[0, 1] == pytest.approx(summed[1, 1], abs=1e-3)
    decoupled = decoupled_advantages(both)
    assert decoupled[1, 1] == pytest.approx(2 * decoupled[0, 1], abs=1e-3)
    assert np.std(decoupled, ddof=1) == pytest.approx(1, abs=1e-3)
