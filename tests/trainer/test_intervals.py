"""Intervals of other prompts: against resampling them one by one, and against exact ones."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.evaluation.intervals import Estimate, estimate


def pairs(by_prompt: list[list[float]]) -> tuple[np.ndarray, np.ndarray]:
    """The values of all pairs, and what each is about."""
    numbers = np.repeat(np.arange(len(by_prompt)), [len(values) for values in by_prompt])
    return np.array([v for values in by_prompt for v in values]), numbers


def test_prompts_are_drawn_with_all_their_pairs() -> None:
    random = np.random.default_rng(3)
    by_prompt = [
        list(random.choice([0.0, 0.5, 1.0], size=random.integers(1, 30), p=[q, 0.1, 0.9 - q]))
        for q in random.uniform(0, 0.6, size=59)
    ]
    values, prompts = pairs(by_prompt)
    found = estimate(values, prompts)
    sums, sizes = np.array([[sum(v), len(v)] for v in by_prompt]).T
    drawn = random.integers(0, 59, (20_000, 59))
    means = sums[drawn].sum(1) / sizes[drawn].sum(1)
    assert (found.low, found.high) == pytest.approx(np.percentile(means, (2.5, 97.5)), abs=0.01)
    assert found.stderr == pytest.approx(means.std(), rel=0.1)
    assert found.mean == pytest.approx(values.mean())
    assert found.num_prompts == 59
    as_if_independent = values.std() / math.sqrt(len(values))
    assert found.stderr > 2 * as_if_independent  # what resampling pairs would have said


@pytest.mark.parametrize(("num", "low"), [(1, 0.025), (10, 0.6915), (59, 0.9394), (300, 0.9878)])
def test_of_all_right_and_of_none_the_interval_is_clopper_and_pearsons(num: int, low: float):
    values, prompts = pairs([[1.0] * (i % 3 + 1) for i in range(num)])
    right, wrong = estimate(values, prompts), estimate(1 - values, prompts)
    assert (right.low, right.high) == (pytest.approx(low, abs=5e-5), 1.0)
    assert (wrong.low, wrong.high) == (0.0, pytest.approx(1 - low, abs=5e-5))
    assert right.stderr > 0


def test_prompts_that_are_all_alike_tell_no_more_than_their_number() -> None:
    one = estimate(np.array([1.0, 0.0]), np.array([4, 4]))
    assert (one.mean, one.low, one.high) == (0.5, pytest.approx(0.0125), pytest.approx(0.9875))
    equal = estimate(np.zeros(300), np.arange(300), (-1.0, 1.0))
    assert (equal.mean, equal.low, equal.high) == (
        0.0,
        pytest.approx(-0.0122, abs=1e-4),
        -equal.low,
    )


@pytest.mark.parametrize("num", [10, 100])
def test_one_mistake_more_makes_no_end_of_the_interval_higher(num: int) -> None:
    ends = []
    for wrong in range(4):
        found = estimate(np.array([0.0] * wrong + [1.0] * (num - wrong)), np.arange(num))
        ends.append((found.low, found.high))
    assert ends == sorted(ends, reverse=True)


def test_an_interval_tells_a_sign_or_none() -> None:
    signs = [Estimate(0, low, high, 0.1, 9).sign for low, high in ((0.1, 0.2), (-2, -1), (-1, 1))]
    assert signs == [1, -1, 0]


@given(st.lists(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=1, max_size=5), min_size=1))
def test_the_interval_holds_the_mean_and_stays_between(by_prompt: list[list[float]]) -> None:
    values, prompts = pairs(by_prompt)
    found = estimate(values, prompts)
    assert 0 <= found.low <= found.high <= 1
    assert found.low <= found.mean + 1e-9
    assert found.mean <= found.high + 1e-9
    order = np.random.default_rng(0).permutation(len(values))
    assert estimate(values[order], prompts[order]) == found
    assert estimate(values, 7 * prompts + 2) == found
