"""The queue in front of a device: work-conserving, first come first served, bounded in tokens.

When the device is free, whatever waits is taken, up to the token budget; there is no timer. A
job's sequences (a group, or several) stay together. While a batch runs the next one is prepared,
once it can hold no more. Tokens are counted as they are computed, shared prefixes once. No Ray in
here.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

Sequences = Sequence[Any]
"""Token ids of n sequences, in whatever form the work takes them."""

# The rate is unknown until something was scored; a first guess only shapes the first Retry-After.
_FIRST_TOKENS_PER_S = 10_000.0
_RATE_MEMORY = 0.8

# Fewer tokens at once waste a device, however slow it is.
_MIN_BUDGET = 2048


class Work(Protocol):
    """How the sequences of a batch are scored; jobs of equal work share batches.

    share_computed: of the last run's sequences, those that were not known already (from a cache).
    """

    share_computed: float

    def prepare(self, sequences: Sequences) -> Any:
        """What can be done before the device is free; on a thread of its own."""

    def run(self, prepared: Any) -> Any:
        """n results that can be sliced, in the order of the n sequences; on the device's thread."""


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


@dataclass
class _Job:
    sequences: Sequences
    num_tokens: int
    work: Work
    done: asyncio.Future[BatchResult]
    submitted: float = field(default_factory=time.monotonic)
    is_queued: bool = True


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


def _scores(batch: _Batch, prepared: Any) -> Any:
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
        self._jobs: deque[_Job] = deque()
        self._arrived = asyncio.Event()  # something waits
        self._full = asyncio.Event()  # as much waits as one batch may hold
        self._device = ThreadPoolExecutor(1, "scorer", initializer=on_device)
        self._preparer = ThreadPoolExecutor(1, "preparer")
        self._loop_task: asyncio.Task[None] | None = None
        self.queued_tokens = 0
        self.tokens_per_s = _FIRST_TOKENS_PER_S

    async def submit(self, sequences: Sequences, num_tokens: int, work: Work) -> BatchResult:
        """Score the sequences of one job, in a batch with others of the same work.

        A caller that is cancelled takes its job with it.

        Raises QueueFull, unless the queue is empty: a job above the bound must have a way in.
        """
        if self._jobs and self.queued_tokens + num_tokens > self._max_queued_tokens:
            raise QueueFull(max(0.1, self.queued_tokens / self.tokens_per_s))
        loop = asyncio.get_running_loop()
        if self._loop_task is None:
            self._loop_task = loop.create_task(self._run())
        job = _Job(sequences, num_tokens, work, loop.create_future())
        self._jobs.append(job)
        self._count(num_tokens)
        job.done.add_done_callback(lambda _: self._forget(job))
        self._arrived.set()
        # When the caller is cancelled, so is the future, and `_take` skips the job.
        return await job.done

    async def _run(self) -> None:
        batch: _Batch | None = None
        while True:
            if batch is None:
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
        timely = max(_MIN_BUDGET, int(self.tokens_per_s * self._target_batch_s))
        return min(self.max_batch_tokens, timely)

    def _take(self, *, is_ahead: bool = False) -> _Batch | None:
        """The next batch, oldest first: at least one job, as many alike as the budget holds."""
        jobs: list[_Job] = []
        room = self._budget()
        while self._jobs:
            first = self._jobs[0]
            if jobs and (first.num_tokens > room or first.work != jobs[0].work):
                break
            job = self._jobs.popleft()
            self._forget(job)
            if not job.done.done():
                jobs.append(job)
                room -= job.num_tokens
        if not self._jobs:
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
            results = await loop.run_in_executor(self._device, _scores, batch, prepared)
        except Exception as error:  # whatever the model raises belongs to the callers
            waiting = [job for job in batch.jobs if not job.done.done()]
            if len(batch.jobs) > 1:  # one of them cannot be scored; the others can, without it
                for job in waiting:
                    await self._score(_Batch([job], None))
            elif waiting:
                waiting[0].done.set_exception(error)
            return
        seconds = time.monotonic() - started
        if self._on_batch is not None:
            self._on_batch(batch.num_tokens, seconds)
        self._measure(batch.num_tokens * batch.work.share_computed, seconds)
        start = 0
        for job in batch.jobs:
            end = start + len(job.sequences)
            if not job.done.done():
                waited = started - job.submitted
                job.done.set_result(BatchResult(results[start:end], waited, seconds))
            start = end

    def _forget(self, job: _Job) -> None:
        """Count the job no more: its batch begins, or its caller has hung up before that."""
        if job.is_queued:
            job.is_queued = False
            self._count(-job.num_tokens)

    def _count(self, num_tokens: int) -> None:
        self.queued_tokens += num_tokens
        if self.queued_tokens >= self._budget():
            self._full.set()
        else:
            self._full.clear()

    def _measure(self, num_tokens: float, seconds: float) -> None:
        if num_tokens == 0:  # all known: nothing was learnt about the device
            return
        rate = num_tokens / max(seconds, 1e-6)
        self.tokens_per_s = _RATE_MEMORY * self.tokens_per_s + (1 - _RATE_MEMORY) * rate
