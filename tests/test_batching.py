"""Batch plans and the queue in front of a device."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reward_actor.batching import plan_batches
from serve.batcher import Batcher, QueueFull


@given(st.lists(st.integers(1, 300), max_size=60), st.integers(1, 1000))
def test_a_plan_holds_every_sequence_once_within_the_budget(
    lengths: list[int], budget: int
) -> None:
    plan = plan_batches(lengths, budget)
    assert sorted(index for batch in plan for index in batch) == list(range(len(lengths)))
    for batch in plan:
        padded = len(batch) * max(lengths[index] for index in batch)
        assert padded <= budget or len(batch) == 1


def test_a_budget_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="max_batch_tokens is 0"):
        plan_batches([1], 0)


def sums(rows: list[Sequence[int]]) -> np.ndarray:
    return np.array([sum(row) for row in rows], dtype=np.float32)


sequences = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=20), min_size=1, max_size=6)


@settings(max_examples=30, deadline=None)
@given(st.lists(sequences, min_size=1, max_size=12), st.integers(1, 200))
def test_every_caller_gets_its_own_scores(jobs: list[list[list[int]]], budget: int) -> None:
    async def run() -> list[list[float]]:
        batcher = Batcher(max_batch_tokens=budget, max_queued_tokens=10**9)
        scored = await asyncio.gather(*(batcher.submit(job, sums) for job in jobs))
        return [result.results.tolist() for result in scored]

    assert asyncio.run(run()) == [[float(sum(row)) for row in job] for job in jobs]


class Gate:
    """A scoring function that waits until it is let through, and remembers its batches."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.batches: list[int] = []

    def __call__(self, rows: list[Sequence[int]]) -> np.ndarray:
        self.batches.append(len(rows))
        assert self.open.wait(10)
        return sums(rows)


def test_what_arrives_while_the_device_is_busy_becomes_one_batch() -> None:
    gate = Gate()

    async def run() -> None:
        batcher = Batcher(max_batch_tokens=1000, max_queued_tokens=10**9)
        calls = [asyncio.create_task(batcher.submit([[1]], gate))]
        while not gate.batches:
            await asyncio.sleep(0.001)
        calls += [asyncio.create_task(batcher.submit([[1], [2]], gate)) for _ in range(5)]
        await asyncio.sleep(0.01)
        gate.open.set()
        await asyncio.gather(*calls)
        assert batcher.queued_tokens == 0

    asyncio.run(run())
    assert gate.batches == [1, 10]


def test_a_caller_that_hangs_up_takes_its_work_with_it() -> None:
    gate = Gate()

    async def run() -> None:
        batcher = Batcher(max_batch_tokens=1000, max_queued_tokens=10**9)
        first = asyncio.create_task(batcher.submit([[1]], gate))
        while not gate.batches:
            await asyncio.sleep(0.001)
        left = asyncio.create_task(batcher.submit([[2]] * 7, gate))
        stays = asyncio.create_task(batcher.submit([[3]], gate))
        await asyncio.sleep(0.01)
        left.cancel()
        gate.open.set()
        assert (await stays).results.tolist() == [3.0]
        await first

    asyncio.run(run())
    assert gate.batches == [1, 1]


def test_a_full_queue_refuses_and_says_when_there_is_room() -> None:
    gate = Gate()

    async def run() -> None:
        batcher = Batcher(max_batch_tokens=10, max_queued_tokens=15)
        calls = [asyncio.create_task(batcher.submit([[1] * 10], gate))]
        while not gate.batches:
            await asyncio.sleep(0.001)
        calls.append(asyncio.create_task(batcher.submit([[1] * 10], gate)))
        await asyncio.sleep(0.01)
        with pytest.raises(QueueFull) as refused:
            await batcher.submit([[1] * 10], gate)
        assert refused.value.retry_after_s > 0
        gate.open.set()
        await asyncio.gather(*calls)
        assert (await batcher.submit([[1] * 100], gate)).results.tolist() == [100.0]

    asyncio.run(run())


def test_an_error_of_the_model_reaches_its_callers_and_the_queue_goes_on() -> None:
    def score(rows: list[Sequence[int]]) -> np.ndarray:
        if rows[0][0] == 0:
            raise MemoryError("the device is full")
        return sums(rows)

    async def run() -> None:
        batcher = Batcher(max_batch_tokens=1, max_queued_tokens=10**9)
        bad = asyncio.create_task(batcher.submit([[0]], score))
        good = asyncio.create_task(batcher.submit([[5]], score))
        with pytest.raises(MemoryError, match="the device is full"):
            await bad
        assert (await good).results.tolist() == [5.0]

    asyncio.run(run())


def test_the_oldest_job_goes_first() -> None:
    order: list[int] = []

    def score(rows: list[Sequence[int]]) -> np.ndarray:
        order.extend(row[0] for row in rows)
        time.sleep(0.001)
        return sums(rows)

    async def run() -> None:
        batcher = Batcher(max_batch_tokens=3, max_queued_tokens=10**9)
        sizes = [5, 1, 1, 4, 2]
        await asyncio.gather(*(batcher.submit([[n] * size], score) for n, size in enumerate(sizes)))

    asyncio.run(run())
    assert order == sorted(order)
