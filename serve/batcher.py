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
from typing import Any

Sequences = Sequence[Sequence[int]]
ScoreFunction = Callable[[Sequences], Any]
"""n sequences to n results that can be sliced; runs on the batcher's thread."""

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
    """What became of one job's n sequences, and the seconds that it waited and was scored."""

    results: Any
    queue_s: float
    score_s: float


@dataclass
class _Job:
    sequences: Sequences
    score: ScoreFunction
    num_tokens: int
    done: asyncio.Future[Scored]
    submitted: float = field(default_factory=time.monotonic)
    is_queued: bool = True


class Batcher:
    """Merges the jobs of many callers into batches for a scoring function.

    Scoring runs on one thread of its own, one batch at a time. Use from one event loop.
    """

    def __init__(self, *, max_batch_tokens: int, max_queued_tokens: int) -> None:
        self._max_batch_tokens = max_batch_tokens
        self._max_queued_tokens = max_queued_tokens
        self._jobs: deque[_Job] = deque()
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="scorer")
        self._loop_task: asyncio.Task[None] | None = None
        self.queued_tokens = 0
        self.tokens_per_s = _FIRST_TOKENS_PER_S

    async def submit(self, sequences: Sequences, score: ScoreFunction) -> Scored:
        """Score the sequences of one job, in a batch with others for the same function.

        A caller that is cancelled takes its job with it.

        Raises QueueFull, unless the queue is empty: a job above the bound must have a way in.
        """
        num_tokens = sum(len(sequence) for sequence in sequences)
        if self._jobs and self.queued_tokens + num_tokens > self._max_queued_tokens:
            raise QueueFull(max(0.1, self.queued_tokens / self.tokens_per_s))
        if self._loop_task is None:
            self._loop_task = asyncio.get_running_loop().create_task(self._run())
        job = _Job(sequences, score, num_tokens, asyncio.get_running_loop().create_future())
        self._jobs.append(job)
        self.queued_tokens += num_tokens
        job.done.add_done_callback(lambda _: self._forget(job))
        self._arrived.set()
        return (
            await job.done
        )  # when the caller is cancelled, so is the future, and `_take` skips it

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
                results = await loop.run_in_executor(self._thread, batch[0].score, sequences)
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
                    job.done.set_result(Scored(results[start:end], waited, seconds))
                start = end

    def _take(self) -> list[_Job]:
        """The next batch, oldest first: at least one job, as many alike as the budget holds."""
        batch: list[_Job] = []
        room = self._max_batch_tokens
        while self._jobs:
            first = self._jobs[0]
            if batch and (first.num_tokens > room or first.score != batch[0].score):
                break
            job = self._jobs.popleft()
            self._forget(job)
            if not job.done.done():
                batch.append(job)
                room -= job.num_tokens
        if not self._jobs:
            self._arrived.clear()
        return batch

    def _forget(self, job: _Job) -> None:
        """Count the job no more: its batch begins, or its caller has hung up before that."""
        if job.is_queued:
            job.is_queued = False
            self.queued_tokens -= job.num_tokens

    def _measure(self, num_tokens: int, seconds: float) -> None:
        rate = num_tokens / max(seconds, 1e-6)
        self.tokens_per_s = _RATE_MEMORY * self.tokens_per_s + (1 - _RATE_MEMORY) * rate
