"""The queue in front of a device: work-conserving, first come first served, bounded in tokens.

When the device is free, whatever waits is taken, up to the token budget; there is no timer. A
job's sequences (a group, or several) stay together. While a batch runs the next one is prepared,
once it can hold no more. Tokens are counted as they are computed, shared prefixes once. No Ray in
here.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any, Protocol

from reward_actor.scheduling import Rate, Waiting, halves

Sequences = Sequence[Any]
"""Token ids of n sequences, in whatever form the work takes them."""


class Work(Protocol):
    """How the sequences of a batch are scored; jobs of equal work share batches."""

    def prepare(self, sequences: Sequences) -> Any:
        """What can be done before the device is free; on a thread of its own."""

    def run(self, prepared: Any) -> tuple[Any, float]:
        """n results that can be sliced, in the order of the n sequences, and the share of them that
        was not known already (from a cache); on the device's thread."""


class QueueFull(Exception):
    """The queue holds as many tokens as it may; `retry_after_s` is when there should be room."""

    def __init__(self, retry_after_s: float) -> None:
        super().__init__(f"the queue is full; try again in {retry_after_s:.1f} s")
        self.retry_after_s = retry_after_s


@dataclass(frozen=True)
class BatchResult:
    """What became of one job's n sequences, and the seconds that it waited and was scored."""

    results: Any
    queue_s: float
    score_s: float


@dataclass(eq=False)
class _Job:
    sequences: Sequences
    num_tokens: int
    work: Work
    done: asyncio.Future[BatchResult]
    submitted: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class _Batch:
    """prepared: what another thread makes of it meanwhile; None where the device is free, and
    preparing and running is one way there and back."""

    jobs: list[_Job]
    prepared: asyncio.Future[Any] | None

    @property
    def work(self) -> Work:
        return self.jobs[0].work

    @property
    def sequences(self) -> list[Any]:
        return [sequence for job in self.jobs for sequence in job.sequences]

    @property
    def num_tokens(self) -> int:
        return sum(job.num_tokens for job in self.jobs)


def _scores(batch: _Batch, prepared: Any) -> tuple[Any, float]:
    if batch.prepared is None:
        prepared = batch.work.prepare(batch.sequences)
    return batch.work.run(prepared)


class Batcher:
    """Merges the jobs of many callers into batches. Use from one event loop."""

    def __init__(
        self,
        *,
        max_batch_tokens: int,
        max_queued_tokens: int,
        target_batch_s: float = 0.5,
        on_batch: Callable[[int, float], None] | None = None,
        on_device: Callable[[], None] | None = None,
    ) -> None:
        """on_batch: called with the tokens of every batch and the seconds that it took; on_device:
        called once on the thread that runs batches, before the first of them."""
        self.max_batch_tokens = max_batch_tokens
        self._max_queued_tokens = max_queued_tokens
        self._target_batch_s = target_batch_s
        self._on_batch = on_batch
        self._jobs: Waiting[_Job] = Waiting(lambda job: job.num_tokens, lambda _: self._mark_full())
        self.rate = Rate()
        self._arrived = asyncio.Event()  # something waits
        self._idle = asyncio.Event()  # nothing waits and nothing runs
        self._idle.set()
        self._full = asyncio.Event()  # as much waits as one batch may hold
        self._device = ThreadPoolExecutor(1, "scorer", initializer=on_device)
        self._preparer = ThreadPoolExecutor(1, "preparer")
        self._loop_task: asyncio.Task[None] | None = None

    @property
    def queued_tokens(self) -> int:
        return self._jobs.size

    async def submit(self, sequences: Sequences, num_tokens: int, work: Work) -> BatchResult:
        """Score the sequences of one job, in a batch with others of the same work.

        A caller that is cancelled takes its job with it.

        Raises QueueFull, unless the queue is empty: a job above the bound must have a way in.
        """
        if self._jobs and self.queued_tokens + num_tokens > self._max_queued_tokens:
            raise QueueFull(max(0.1, self.queued_tokens / self.rate.tokens_per_s))
        loop = asyncio.get_running_loop()
        if self._loop_task is None:
            self._loop_task = loop.create_task(self._run())
        job = _Job(sequences, num_tokens, work, loop.create_future())
        self._jobs.add(job)
        self._mark_full()
        self._idle.clear()
        self._arrived.set()
        return await job.done

    async def idle(self) -> None:
        """Returns when nothing waits and nothing runs any more."""
        await self._idle.wait()

    async def _run(self) -> None:
        batch: _Batch | None = None
        while True:
            if batch is None:
                if not self._jobs:
                    self._idle.set()
                await self._arrived.wait()
                batch = self._take()
            else:
                running = asyncio.create_task(self._score(batch))
                batch = await self._taken_during(running)

    async def _taken_during(self, running: asyncio.Task[None]) -> _Batch | None:
        """The next batch, prepared while this one runs if no further job could join it."""
        full = asyncio.create_task(self._full.wait())
        await asyncio.wait({running, full}, return_when=asyncio.FIRST_COMPLETED)
        full.cancel()
        following = None if running.done() else self._take(is_ahead=True)
        await running
        return following

    def _budget(self) -> int:
        """Tokens of one batch: what fits, and takes no longer than it should."""
        return min(self.max_batch_tokens, self.rate.timely_tokens(self._target_batch_s))

    def _take(self, *, is_ahead: bool = False) -> _Batch | None:
        """The next batch, oldest first: at least one job, as many alike as the budget holds."""
        oldest = self._jobs.oldest(self._budget())
        jobs = list(takewhile(lambda job: job.work == oldest[0].work, oldest))
        for job in jobs:
            self._jobs.remove(job)
        self._mark_full()
        if not self._jobs or not jobs:
            self._arrived.clear()
        if not jobs:
            return None
        batch = _Batch(jobs, None)
        if not is_ahead:
            return batch
        loop = asyncio.get_running_loop()
        prepared = loop.run_in_executor(self._preparer, batch.work.prepare, batch.sequences)
        return replace(batch, prepared=prepared)

    async def _score(self, batch: _Batch) -> None:
        loop = asyncio.get_running_loop()
        try:
            prepared = None if batch.prepared is None else await batch.prepared
            if all(job.done.done() for job in batch.jobs):  # all have hung up since
                return
            started = time.monotonic()
            results, share_computed = await loop.run_in_executor(
                self._device, _scores, batch, prepared
            )
        except Exception as error:  # whatever the model raises belongs to the callers
            if len(batch.jobs) > 1:
                for half in halves(batch.jobs):
                    await self._score(_Batch(half, None))
            elif not batch.jobs[0].done.done():
                batch.jobs[0].done.set_exception(error)
            return
        seconds = time.monotonic() - started
        if self._on_batch is not None:
            self._on_batch(batch.num_tokens, seconds)
        if share_computed:  # else all was known, and nothing learnt about the device
            self.rate.measure(batch.num_tokens * share_computed / max(seconds, 1e-6))
        start = 0
        for job in batch.jobs:
            end = start + len(job.sequences)
            if not job.done.done():
                waited = started - job.submitted
                job.done.set_result(BatchResult(results[start:end], waited, seconds))
            start = end

    def _mark_full(self) -> None:
        """Whether as much waits as one batch may hold."""
        if self.queued_tokens >= self._budget():
            self._full.set()
        else:
            self._full.clear()
