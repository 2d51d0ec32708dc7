"""The queue in front of a device: work-conserving, first come first served, bounded in tokens.

When the device is free, whatever waits is taken, up to the token budget; there is no timer. A
job's sequences (a group, or several) stay together. No Ray in here.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Sequences = Sequence[Sequence[int]]
Result = TypeVar("Result")

# The rate is unknown until something was scored; a first guess only shapes the first Retry-After.
_FIRST_TOKENS_PER_S = 10_000.0
_RATE_MEMORY = 0.8


class QueueFull(Exception):
    """The queue holds as many tokens as it may; `retry_after_s` is when there should be room."""

    def __init__(self, retry_after_s: float) -> None:
        super().__init__(f"the queue is full; try again in {retry_after_s:.1f} s")
        self.retry_after_s = retry_after_s


@dataclass(frozen=True)
class Scored:
    """Raw scores of one job's sequences (n,) and the seconds that it waited and was scored."""

    raw_scores: NDArray[np.float32]
    queue_s: float
    score_s: float


@dataclass
class _Job:
    sequences: Sequences
    num_tokens: int
    done: asyncio.Future[Scored]
    submitted: float = field(default_factory=time.monotonic)


class Batcher:
    """Merges the jobs of many callers into batches for one scoring function.

    `score` runs on a thread of its own, one batch at a time. Use from one event loop.
    """

    def __init__(
        self,
        score: Callable[[list[Sequence[int]]], NDArray[np.float32]],
        *,
        max_batch_tokens: int,
        max_queued_tokens: int,
    ) -> None:
        self._score = score
        self._max_batch_tokens = max_batch_tokens
        self._max_queued_tokens = max_queued_tokens
        self._jobs: deque[_Job] = deque()
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="scorer")
        self._loop_task: asyncio.Task[None] | None = None
        self.queued_tokens = 0
        self.tokens_per_s = _FIRST_TOKENS_PER_S

    async def submit(self, sequences: Sequences) -> Scored:
        """Score the sequences of one job. A caller that is cancelled takes its job with it.

        Raises QueueFull, unless the queue is empty: a job above the bound must have a way in.
        """
        num_tokens = sum(len(sequence) for sequence in sequences)
        if self._jobs and self.queued_tokens + num_tokens > self._max_queued_tokens:
            raise QueueFull(max(0.1, self.queued_tokens / self.tokens_per_s))
        if self._loop_task is None:
            self._loop_task = asyncio.get_running_loop().create_task(self._run())
        job = _Job(sequences, num_tokens, asyncio.get_running_loop().create_future())
        self._jobs.append(job)
        self.queued_tokens += num_tokens
        self._arrived.set()
        return (
            await job.done
        )  # when the caller is cancelled, so is the future, and `_take` skips it

    async def alone(self, function: Callable[[Sequences], Result], sequences: Sequences) -> Result:
        """Run something else on the device, between two batches."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, function, sequences)

    async def close(self) -> None:
        """Stop scoring; jobs that still wait are cancelled."""
        if self._loop_task is not None:
            self._loop_task.cancel()
        for job in self._jobs:
            job.done.cancel()
        self._thread.shutdown(wait=False)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._arrived.wait()
            batch = self._take()
            if not batch:
                continue
            started = time.monotonic()
            sequences = [sequence for job in batch for sequence in job.sequences]
            try:
                scores = await loop.run_in_executor(self._thread, self._score, sequences)
            except Exception as error:  # whatever the model raises belongs to the callers
                for job in batch:
                    if not job.done.done():
                        job.done.set_exception(error)
                continue
            seconds = time.monotonic() - started
            self._measure(sum(job.num_tokens for job in batch), seconds)
            start = 0
            for job in batch:
                end = start + len(job.sequences)
                if not job.done.done():
                    waited = started - job.submitted
                    job.done.set_result(Scored(scores[start:end], waited, seconds))
                start = end

    def _take(self) -> list[_Job]:
        """The jobs of the next batch, oldest first: at least one, as many as the budget holds."""
        batch: list[_Job] = []
        room = self._max_batch_tokens
        while self._jobs and (not batch or self._jobs[0].num_tokens <= room):
            job = self._jobs.popleft()
            self.queued_tokens -= job.num_tokens
            if not job.done.done():
                batch.append(job)
                room -= job.num_tokens
        if not self._jobs:
            self._arrived.clear()
        return batch

    def _measure(self, num_tokens: int, seconds: float) -> None:
        rate = num_tokens / max(seconds, 1e-6)
        self.tokens_per_s = _RATE_MEMORY * self.tokens_per_s + (1 - _RATE_MEMORY) * rate
