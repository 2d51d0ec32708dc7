"""Which comparisons make up a step and who computes them: properties of the plans."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.comparisons import Comparison, Comparisons
from trainer.data.micro_batches import (
    distinct_tokens,
    forest_micro_batches,
    global_batch,
    padded_micro_batches,
    plan,
    steps_per_epoch,
    with_noise,
)

costs = st.lists(st.integers(1, 500), max_size=60)
workers = st.integers(1, 5)
budgets = st.integers(1, 1000)
ids = st.lists(st.integers(0, 3), min_size=1, max_size=12)


def comparisons_of(groups: list[list[list[int]]]) -> Comparisons:
    items = [
        Comparison(group, [float(-i) for i in range(len(group))], str(number))
        for number, group in enumerate(groups)
    ]
    return Comparisons.of(items, ["data"])


@given(costs, budgets, workers)
def test_every_comparison_is_computed_once_in_as_many_passes_on_every_worker(
    costs: list[int], budget: int, num_workers: int
) -> None:
    widths = [2] * len(costs)
    for micro_batches in (
        forest_micro_batches(costs, budget, num_workers),
        padded_micro_batches(costs, widths, budget, num_workers),
    ):
        assert len(micro_batches) == num_workers
        assert len({len(mine) for mine in micro_batches}) == 1
        assert sorted(i for mine in micro_batches for one in mine for i in one) == list(
            range(len(costs))
        )


@given(costs, budgets, workers)
def test_a_pass_keeps_to_its_budget_unless_one_comparison_alone_does_not(
    costs: list[int], budget: int, num_workers: int
) -> None:
    for mine in forest_micro_batches(costs, budget, num_workers):
        for one in mine:
            assert len(one) < 2 or sum(costs[i] for i in one) <= budget
    for mine in padded_micro_batches(costs, [2] * len(costs), budget, num_workers):
        for one in mine:
            assert len(one) < 2 or 2 * len(one) * max(costs[i] for i in one) <= budget


@given(st.lists(st.integers(1, 50), min_size=8, max_size=60), workers)
def test_the_work_is_shared_evenly(costs: list[int], num_workers: int) -> None:
    """No micro-batch holds more than the mean and one comparison: the largest go first."""
    micro_batches = forest_micro_batches(costs, 100, num_workers)
    loads = [sum(costs[i] for i in one) for mine in micro_batches for one in mine]
    assert max(loads) <= sum(costs) / len(loads) + max(costs)


def test_as_few_passes_as_the_budget_allows() -> None:
    assert forest_micro_batches([10] * 8, 40, 1) == [[[0, 2, 4, 6], [1, 3, 5, 7]]]
    assert len(forest_micro_batches([10] * 8, 39, 1)[0]) == 3
    assert forest_micro_batches([], 10, 2) == [[[]], [[]]]


@given(st.lists(st.lists(ids, min_size=1, max_size=4), min_size=1, max_size=6))
def test_distinct_tokens_are_the_distinct_prefixes(groups: list[list[list[int]]]) -> None:
    comparisons = comparisons_of(groups)
    for index, group in enumerate(groups):
        prefixes = {tuple(s[: n + 1]) for s in group for n in range(len(s))}
        assert distinct_tokens(comparisons, index) == len(prefixes)


@given(st.lists(st.lists(ids, min_size=1, max_size=4), min_size=1, max_size=6), budgets, workers)
def test_a_plan_names_the_comparisons_of_its_batch(
    groups: list[list[list[int]]], budget: int, num_workers: int
) -> None:
    comparisons = comparisons_of(groups)
    batch = list(range(len(groups)))[::-1]
    for packed in (True, False):
        micro_batches = plan(comparisons, batch, budget, num_workers, packed=packed)
        assert sorted(i for mine in micro_batches for one in mine for i in one) == sorted(batch)


@given(st.integers(1, 100), st.integers(1, 40), st.integers(0, 9))
def test_an_epoch_takes_everything_once_in_an_order_of_its_own(
    num: int, size: int, seed: int
) -> None:
    steps = -(-num // size)
    epochs = [
        [
            int(i)
            for step in range(steps)
            for i in global_batch(num, size, seed, epoch * steps + step)
        ]
        for epoch in range(2)
    ]
    for epoch in epochs:
        assert sorted(epoch) == list(range(num))
    assert num < 8 or epochs[0] != epochs[1]


@given(st.integers(1, 60), st.integers(1, 20), st.integers(0, 2**32))
def test_an_epoch_is_every_pair_once(num_pairs: int, size: int, seed: int):
    steps = steps_per_epoch(num_pairs, size)
    for epoch in range(2):
        batches = [global_batch(num_pairs, size, seed, epoch * steps + i) for i in range(steps)]
        assert sorted(np.concatenate(batches)) == list(range(num_pairs))
        assert all(len(batch) == size for batch in batches[:-1])


@given(st.lists(ids, min_size=2, max_size=4), st.floats(0, 0.9), st.integers(0, 9))
def test_noise_is_the_same_in_what_sequences_begin_with_alike(
    sequences: list[list[int]], share: float, seed: int
) -> None:
    common = [5, 6, 7, 8]
    whole = [common + ids for ids in sequences]
    random = np.random.Generator(np.random.PCG64(seed))
    noisy = with_noise(whole, share, np.array([9, 10], dtype=np.int32), random)
    assert [len(ids) for ids in noisy] == [len(ids) for ids in whole]
    assert {tuple(ids[: len(common)]) for ids in noisy} == {tuple(noisy[0][: len(common)])}
    for before, after in zip(whole, noisy, strict=True):
        assert after[-1] == before[-1], "the head reads it"
        assert all(new in (old, 9, 10) for old, new in zip(before, after, strict=True))
    if share == 0:
        assert noisy == whole


def test_as_many_tokens_are_replaced_as_asked_for_by_what_is_as_frequent_as_in_the_data() -> None:
    random = np.random.Generator(np.random.PCG64(0))
    vocabulary = np.array([2, 2, 2, 3], dtype=np.int32)
    (noisy,) = with_noise([[1] * 20_001], 0.4, vocabulary, random)
    assert noisy.count(2) / 20_000 == pytest.approx(0.3, abs=0.02)
    assert noisy.count(3) / 20_000 == pytest.approx(0.1, abs=0.02)
