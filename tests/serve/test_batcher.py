"""The queue in front of a device."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.replica.batcher import Batcher, BatchResult, QueueFull, Sequences


class Sums:
    """Work that adds up the ids of each sequence, and remembers its batches."""

    share_computed = 1.0

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.prepared: list[int] = []

    def prepare(self, sequences: Sequences) -> Sequences:
        self.prepared.append(len(sequences))
        return sequences

    def run(self, prepared: Sequences) -> tuple[np.ndarray, float]:
        self.batches.append(len(prepared))
        sums = np.array([sum(row) for row in prepared], dtype=np.float32)
        return sums, self.share_computed


class Gate(Sums):
    """The same, but it waits until it is let through."""

    def __init__(self) -> None:
        super().__init__()
        self.open = threading.Event()

    def run(self, prepared: Sequences) -> tuple[np.ndarray, float]:
        results = super().run(prepared)
        assert self.open.wait(10)
        return results


def submit(batcher: Batcher, sequences: Sequences, work: Sums) -> Coroutine[Any, Any, BatchResult]:
    return batcher.submit(sequences, sum(map(len, sequences)), work)


async def until(true: Callable[[], Any]) -> None:
    while not true():
        await asyncio.sleep(0.001)


sequences = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=20), min_size=1, max_size=6)


@given(st.lists(sequences, min_size=1, max_size=12), st.integers(1, 200))
def test_every_caller_gets_its_own_scores(jobs: list[list[list[int]]], budget: int) -> None:
    async def run() -> list[list[float]]:
        batcher = Batcher(max_batch_tokens=budget, max_queued_tokens=10**9)
        work = Sums()
        scored = await asyncio.gather(*(submit(batcher, job, work) for job in jobs))
        assert batcher.queued_tokens == 0
        return [result.results.tolist() for result in scored]

    assert asyncio.run(run()) == [[float(sum(row)) for row in job] for job in jobs]


def test_what_arrives_while_the_device_is_busy_becomes_one_batch() -> None:
    gate = Gate()

    async def run() -> None:
        batcher = Batcher(max_batch_tokens=1000, max_queued_tokens=10**9)
        calls = [asyncio.create_task(submit(batcher, [[1]], gate))]
        await until(lambda: gate.batches)
        calls += [asyncio.create_task(submit(batcher, [[1], [2]], gate)) for _ in range(5)]
        await asyncio.sleep(0.01)
        assert gate.prepared == [1], "a batch that can still grow is not closed"
        gate.open.set()
        await asyncio.gather(*calls)
        assert batcher.queued_tokens == 0

    asyncio.run(run())
    assert gate.batches == [1, 10]


def test_a_full_batch_is_prepared_while_another_runs() -> None:
    gate = Gate()

    async def run() -> None:
        batcher = Batcher(max_batch_tokens=4, max_queued_tokens=10**9)
        calls = [asyncio.create_task(submit(batcher, [[1]], gate))]
        await until(lambda: gate.batches)
        calls += [asyncio.create_task(submit(batcher, [[1], [2]], gate)) for _ in range(5)]
        await until(lambda: len(gate.prepared) == 2)
        await asyncio.sleep(0.01)
        assert gate.prepared == [1, 4], "only one batch is prepared ahead"
        assert gate.batches == [1]
        gate.open.set()
        await asyncio.gather(*calls)

    asyncio.run(run())
    assert gate.batches == [1, 4, 4, 2]


def test_work_of_another_kind_gets_batches_of_its_own() -> None:
    one, other = Sums(), Sums()

    async def run() -> None:
        batcher = Batcher(max_batch_tokens=1000, max_queued_tokens=10**9)
        calls = [submit(batcher, [[n]], one if n < 3 else other) for n in range(5)]
        await asyncio.gather(*calls)

    asyncio.run(run())
    assert (one.batches, other.batches) == ([3], [2])


def test_a_caller_that_hangs_up_takes_its_work_with_it() -> None:
    gate = Gate()

    async def run() -> None:
        batcher = Batcher(max_batch_tokens=1000, max_queued_tokens=10**9)
        first = asyncio.create_task(submit(batcher, [[1]], gate))
        await until(lambda: gate.batches)
        left = asyncio.create_task(submit(batcher, [[2]] * 7, gate))
        stays = asyncio.create_task(submit(batcher, [[3]], gate))
        await asyncio.sleep(0.01)
        left.cancel()
        gate.open.set()
        assert (await stays).results.tolist() == [3.0]
        await first

    asyncio.run(run())
    assert gate.batches == [1, 1]


def test_a_batch_ahead_whose_callers_hang_up_does_not_run() -> None:
    gate = Gate()

    async def run() -> None:
        batcher = Batcher(max_batch_tokens=2, max_queued_tokens=10**9)
        first = asyncio.create_task(submit(batcher, [[1]], gate))
        await until(lambda: gate.batches)
        ahead = asyncio.create_task(submit(batcher, [[2], [2]], gate))
        await until(lambda: len(gate.prepared) == 2)
        stays = asyncio.create_task(submit(batcher, [[3]], gate))
        ahead.cancel()
        gate.open.set()
        assert (await stays).results.tolist() == [3.0]
        await first

    asyncio.run(run())
    assert gate.batches == [1, 1]


def test_a_full_queue_refuses_and_says_when_there_is_room() -> None:
    gate = Gate()

    async def run() -> None:
        batcher = Batcher(max_batch_tokens=20, max_queued_tokens=15)
        calls = [asyncio.create_task(submit(batcher, [[1] * 10], gate))]
        await until(lambda: gate.batches)
        calls.append(asyncio.create_task(submit(batcher, [[1] * 10], gate)))
        await asyncio.sleep(0.01)
        with pytest.raises(QueueFull) as refused:
            await submit(batcher, [[1] * 10], gate)
        assert refused.value.retry_after_s > 0
        gate.open.set()
        await asyncio.gather(*calls)
        assert (await submit(batcher, [[1] * 100], gate)).results.tolist() == [100.0]

    asyncio.run(run())


def test_an_error_of_the_model_reaches_its_callers_and_the_queue_goes_on() -> None:
    class Fails(Sums):
        def run(self, prepared: Sequences) -> tuple[np.ndarray, float]:
            if prepared[0][0] == 0:
                raise MemoryError("the device is full")
            return super().run(prepared)

    class FailsEarly(Sums):
        def prepare(self, sequences: Sequences) -> Sequences:
            raise ValueError(f"no plan for {len(sequences)}")

    async def run() -> None:
        batcher = Batcher(max_batch_tokens=1, max_queued_tokens=10**9)
        work = Fails()
        bad = asyncio.create_task(submit(batcher, [[0]], work))
        worse = asyncio.create_task(submit(batcher, [[1]], FailsEarly()))
        good = asyncio.create_task(submit(batcher, [[5]], work))
        with pytest.raises(MemoryError, match="the device is full"):
            await bad
        with pytest.raises(ValueError, match="no plan"):
            await worse
        assert (await good).results.tolist() == [5.0]

    asyncio.run(run())


def test_a_job_that_cannot_be_scored_fails_alone() -> None:
    class Picky(Gate):
        def run(self, prepared: Sequences) -> tuple[np.ndarray, float]:
            results = super().run(prepared)
            if any(666 in row for row in prepared):
                raise RuntimeError("too long")
            return results

    async def run() -> None:
        batcher, work = Batcher(max_batch_tokens=100, max_queued_tokens=1000), Picky()
        first = asyncio.create_task(submit(batcher, [[1]], work))
        await until(lambda: work.batches)
        calls = [asyncio.create_task(submit(batcher, [[n]], work)) for n in (2, 666, 3)]
        await asyncio.sleep(0.01)
        work.open.set()
        await first
        found = await asyncio.gather(*calls, return_exceptions=True)
        assert isinstance(found[1], RuntimeError)
        scored = [each.results.tolist() for each in found if isinstance(each, BatchResult)]
        assert scored == [[2.0], [3.0]]

    asyncio.run(run())


def test_the_oldest_job_goes_first() -> None:
    order: list[int] = []

    class Ordered(Sums):
        def run(self, prepared: Sequences) -> tuple[np.ndarray, float]:
            order.extend(row[0] for row in prepared)
            time.sleep(0.001)
            return super().run(prepared)

    async def run() -> None:
        batcher = Batcher(max_batch_tokens=3, max_queued_tokens=10**9)
        sizes = [5, 1, 1, 4, 2]
        work = Ordered()
        await asyncio.gather(*(submit(batcher, [[n] * size], work) for n, size in enumerate(sizes)))

    asyncio.run(run())
    assert order == sorted(order)


def test_a_slow_device_gets_batches_that_end_in_time() -> None:
    class Slow(Sums):
        def run(self, prepared: Sequences) -> tuple[np.ndarray, float]:
            time.sleep(1e-5 * sum(map(len, prepared)))  # 100,000 tokens/s
            return super().run(prepared)

    async def run() -> list[int]:
        batcher = Batcher(max_batch_tokens=10**9, max_queued_tokens=10**9, target_batch_s=0.05)
        work = Slow()
        for _ in range(20):  # until the rate is known
            await submit(batcher, [[1] * 2000], work)
        work.batches.clear()
        await asyncio.gather(*(submit(batcher, [[1] * 100], work) for _ in range(500)))
        return work.batches

    batches = asyncio.run(run())
    assert max(batches) <= 60, "100 tokens each: more would take longer than 0.05 s"


def test_what_a_cache_knows_teaches_nothing_about_the_device() -> None:
    class Known(Sums):
        share_computed = 0.0

    async def run() -> None:
        batcher = Batcher(max_batch_tokens=1000, max_queued_tokens=10**9)
        before = batcher.rate.tokens_per_s
        await submit(batcher, [[1] * 1000], Known())
        assert batcher.rate.tokens_per_s == before
        await submit(batcher, [[1] * 1000], Sums())
        assert batcher.rate.tokens_per_s != before

    asyncio.run(run())


def test_it_is_idle_when_nothing_waits_and_nothing_runs() -> None:
    async def run() -> None:
        batcher = Batcher(max_batch_tokens=3, max_queued_tokens=10**9)
        await batcher.idle()
        gate = Gate()
        jobs = [asyncio.create_task(submit(batcher, [[1, 2, 3]], gate)) for _ in range(3)]
        await until(lambda: gate.batches)
        jobs[2].cancel()
        idle = asyncio.create_task(batcher.idle())
        await asyncio.sleep(0.05)
        assert not idle.done()
        gate.open.set()
        await asyncio.wait_for(idle, 10)
        assert all(job.done() for job in jobs)
        assert len(gate.batches) == 2

    asyncio.run(run())
