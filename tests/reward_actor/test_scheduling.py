"""What queues have in common: who hung up is dropped, the others are served in order."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest

from reward_actor.scheduling import Rate, Waiting, drop_when_abandoned, halves, wait_for_all


@dataclass(eq=False)
class Part:
    size: int = 1
    done: asyncio.Future[int] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


def test_what_waits_leaves_when_it_is_taken_or_its_caller_hangs_up() -> None:
    async def run() -> None:
        left: list[Part] = []
        waiting = Waiting(lambda part: part.size, left.append)
        parts = [Part(size) for size in (1, 2, 4, 8)]
        for part in parts:
            waiting.add(part)
        parts[1].done.cancel()
        assert list(waiting) == [parts[0], *parts[2:]], "at once"
        await asyncio.sleep(0)
        assert (len(waiting), waiting.size) == (3, 13)
        waiting.remove(parts[0])
        assert left == [parts[1]], "taken is not done"
        parts[0].done.set_result(0)
        await asyncio.sleep(0)
        assert (list(waiting), waiting.size, left) == (parts[2:], 12, [parts[1], parts[0]])
        assert waiting.oldest(12) == parts[2:]
        assert waiting.oldest(11) == waiting.oldest(1) == parts[2:3], "the first in any case"

    asyncio.run(run())


def test_when_one_fails_or_the_caller_is_cancelled_the_others_are_dropped() -> None:
    async def run() -> None:
        for outcome in (ValueError("no"), None):
            futures = [Part().done for _ in range(3)]
            call = asyncio.create_task(wait_for_all(futures))
            await asyncio.sleep(0)
            futures[0].set_result(1)
            call.cancel() if outcome is None else futures[1].set_exception(outcome)
            with pytest.raises((ValueError, asyncio.CancelledError)):
                await call
            assert futures[2].cancelled()
        futures = [Part().done for _ in range(3)]
        for number, future in enumerate(futures):
            future.set_result(number)
        assert await wait_for_all(futures) == [0, 1, 2]

    asyncio.run(run())


@pytest.mark.parametrize("num_patient", [0, 1])
def test_a_task_ends_with_the_last_of_its_callers(num_patient: int) -> None:
    async def run() -> None:
        parts = [Part() for _ in range(3)]
        task: asyncio.Task[None] = asyncio.create_task(asyncio.sleep(60))
        drop_when_abandoned(parts, task)
        for part in parts[num_patient:]:
            part.done.cancel()
        await asyncio.wait({task}, timeout=0.01)
        assert task.cancelled() is (num_patient == 0)
        task.cancel()

    asyncio.run(run())


def test_halves_hold_all_that_wait() -> None:
    async def run() -> None:
        parts = [Part() for _ in range(6)]
        parts[1].done.cancel()
        assert halves(parts) == [[parts[0], *parts[2:4]], parts[4:]]
        assert halves(parts[:2]) == [[parts[0]]]
        assert halves(parts[1:2]) == []

    asyncio.run(run())


def test_a_rate_follows_what_is_measured() -> None:
    rate = Rate()
    for _ in range(50):
        rate.measure(100_000.0)
    assert rate.tokens_per_s == pytest.approx(100_000, rel=0.01)
    assert rate.timely_tokens(0.5) == pytest.approx(50_000, rel=0.01)
    assert rate.timely_tokens(0.0) > 0
