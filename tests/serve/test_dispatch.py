"""From requests to replicas: merged, sent again, refused in time. Without Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from id_groups import Groups, groups_of_ids

from reward_actor.errors import RewardServiceError
from serve.ingress import dispatch
from serve.ingress.dispatch import Dispatcher, OtherVersion, ReplicaLost
from serve.wire import FlatSequences, ReplicaReply


def sums(message: FlatSequences) -> np.ndarray:
    return np.array([[float(row.sum())] for row in message.rows()], np.float32)


def reply(message: FlatSequences, **changes: Any) -> ReplicaReply:
    fields: dict[str, Any] = {"raw_scores": sums(message), "tokens_per_s": 10_000.0, **changes}
    return ReplicaReply(fields.pop("status", "ok"), fields.pop("generation", 0), **fields)


class Replicas:
    """Replicas that answer when they are let, and keep what they were sent."""

    def __init__(self, *faults: Callable[[FlatSequences], ReplicaReply]) -> None:
        self.messages: list[FlatSequences] = []
        self.cancelled = 0
        self.open = asyncio.Event()
        self._faults = list(faults)

    async def send(self, message: FlatSequences, token_scores: bool) -> ReplicaReply:
        self.messages.append(message)
        if self._faults:
            return self._faults.pop(0)(message)
        try:
            await self.open.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        tokens = [row[:, None].astype(np.float32) for row in message.rows()]
        return reply(message, token_scores=tokens if token_scores else None)


class Picky(Replicas):
    """They cannot score 666."""

    async def send(self, message: FlatSequences, token_scores: bool) -> ReplicaReply:
        if any(666 in row for row in message.rows()):
            self.messages.append(message)
            return reply(message, status="failed", raw_scores=None, reason="too long")
        return await super().send(message, token_scores)


def dispatcher(replicas: Replicas, **settings: Any) -> Dispatcher:
    given_settings: dict[str, Any] = {
        "max_queued_tokens": 10**9,
        "max_queue_s": 10**9,
        "target_batch_s": 0.5,
        **settings,
    }
    return Dispatcher(replicas.send, **given_settings)


async def rewards(queue: Dispatcher, groups: Groups, token_scores: bool = False) -> list[float]:
    parts = await queue.score(groups, "v", 0, token_scores)
    return [float(score) for part in parts for score in part.raw_scores[:, 0]]


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


@given(st.lists(groups_of_ids, min_size=1, max_size=12), st.integers(1, 4), st.integers(1, 100))
def test_every_request_gets_its_own_scores(
    requests: list[Groups], num_replicas: int, max_batch_tokens: int
) -> None:
    async def run() -> None:
        replicas = Replicas()
        replicas.open.set()
        queue = dispatcher(replicas)
        queue.num_replicas, queue.max_batch_tokens = num_replicas, max_batch_tokens
        found = await asyncio.gather(*(rewards(queue, groups) for groups in requests))
        assert found == [[float(sum(s)) for g in groups for s in g] for groups in requests]
        assert queue.queued_tokens == 0

    asyncio.run(run())


def test_small_requests_travel_together_while_the_replicas_are_busy() -> None:
    async def run() -> None:
        replicas = Replicas()
        queue = dispatcher(replicas)
        calls = [asyncio.create_task(rewards(queue, [[[n]]])) for n in range(64)]
        await settle()
        assert len(replicas.messages) == 2, "one to be scored and one to wait behind it"
        replicas.open.set()
        assert await asyncio.gather(*calls) == [[float(n)] for n in range(64)]
        assert [len(m.rows()) for m in replicas.messages] == [1, 1, 62]

    asyncio.run(run())


def test_a_large_request_is_spread_over_the_replicas() -> None:
    async def run() -> None:
        replicas = Replicas()
        queue = dispatcher(replicas)
        queue.num_replicas = 4
        groups = [[[n] * 100] for n in range(80)]  # 8,000 tokens
        call = asyncio.create_task(rewards(queue, groups))
        await settle()
        assert [m.num_tokens for m in replicas.messages] == [2000] * 4
        replicas.open.set()
        assert await call == [100.0 * n for n in range(80)]

    asyncio.run(run())


def test_requests_of_two_kinds_never_share_a_message() -> None:
    async def run() -> None:
        replicas = Replicas()
        queue = dispatcher(replicas)
        calls = [asyncio.create_task(rewards(queue, [[[n]]], n % 2 == 0)) for n in range(10)]
        calls.append(asyncio.create_task(queue.score([[[1]]], "w", 0)))  # type: ignore[arg-type]
        await settle()
        replicas.open.set()
        await asyncio.gather(*calls)
        assert all(len({m.model_version}) == 1 for m in replicas.messages)
        assert [m.model_version for m in replicas.messages].count("w") == 1

    asyncio.run(run())


def test_token_scores_come_back_in_order() -> None:
    async def run() -> None:
        replicas = Replicas()
        replicas.open.set()
        [part] = await dispatcher(replicas).score([[[1, 2], [3]]], "v", 0, True)
        assert part.token_scores is not None
        assert [row[:, 0].tolist() for row in part.token_scores] == [[1.0, 2.0], [3.0]]

    asyncio.run(run())


def lost(message: FlatSequences) -> ReplicaReply:
    raise ReplicaLost


def test_a_message_whose_replica_died_is_sent_again() -> None:
    async def run() -> None:
        replicas = Replicas(lost, lost)
        replicas.open.set()
        assert await rewards(dispatcher(replicas), [[[1, 2], [4]]]) == [3.0, 4.0]
        assert len(replicas.messages) == 3

    asyncio.run(run())


def test_a_replica_behind_a_swap_is_waited_for_and_one_ahead_is_told_of() -> None:
    def refuses(generation: int) -> Callable[[FlatSequences], ReplicaReply]:
        return lambda m: reply(m, status="other_version", generation=generation, raw_scores=None)

    async def run() -> None:
        replicas = Replicas(refuses(-1))
        replicas.open.set()
        assert await rewards(dispatcher(replicas), [[[5]]]) == [5.0]
        with pytest.raises(OtherVersion):
            await rewards(dispatcher(Replicas(refuses(1))), [[[5]]])
        with pytest.raises(OtherVersion):  # of another deployment
            await rewards(dispatcher(Replicas(refuses(0))), [[[5]]])

    asyncio.run(run())


def test_a_replica_that_never_follows_is_of_another_deployment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dispatch, "_FOLLOW_S", 0.1)

    async def send(message: FlatSequences, token_scores: bool) -> ReplicaReply:
        return reply(message, status="other_version", generation=-1, raw_scores=None)

    async def run() -> None:
        queue = dispatcher(Replicas())
        queue._send = send
        with pytest.raises(OtherVersion):
            await asyncio.wait_for(rewards(queue, [[[5]]]), 5)

    asyncio.run(run())


def test_a_request_that_cannot_be_scored_fails_alone() -> None:
    async def run() -> None:
        replicas = Picky()
        queue = dispatcher(replicas)
        first = [asyncio.create_task(rewards(queue, [[[n]]])) for n in (1, 2)]
        await settle()
        calls = [asyncio.create_task(rewards(queue, [[[n]]])) for n in (3, 666, 4)]
        await settle()
        replicas.open.set()
        found = await asyncio.gather(*first, *calls, return_exceptions=True)
        assert [found[i] for i in (0, 1, 2, 4)] == [[1.0], [2.0], [3.0], [4.0]]
        assert isinstance(found[3], RewardServiceError)
        assert found[3].retryable
        assert queue.queued_tokens == 0

    asyncio.run(run())


def test_one_among_many_that_cannot_be_scored_costs_few_messages() -> None:
    async def run() -> None:
        replicas = Picky()
        queue = dispatcher(replicas)
        first = [asyncio.create_task(rewards(queue, [[[n]]])) for n in (1, 2)]
        await settle()
        calls = [asyncio.create_task(rewards(queue, [[[n]]])) for n in [*range(3, 131), 666]]
        await settle()
        replicas.open.set()
        found = await asyncio.gather(*first, *calls, return_exceptions=True)
        assert found[:-1] == [[float(n)] for n in range(1, 131)]
        assert isinstance(found[-1], RewardServiceError)
        assert len(replicas.messages) <= 2 + 1 + 2 * 8, "halves, not each by itself"

    asyncio.run(run())


def test_a_message_belongs_to_no_request() -> None:
    """What a framework ends with a request, by its context, must not be other callers' message."""
    request: ContextVar[str] = ContextVar("request", default="none")
    seen: list[str] = []

    class Watched(Replicas):
        async def send(self, message: FlatSequences, token_scores: bool) -> ReplicaReply:
            seen.append(request.get())
            return await super().send(message, token_scores)

    async def run() -> None:
        replicas = Watched()
        queue = dispatcher(replicas)

        async def ask(name: str) -> list[float]:
            request.set(name)
            return await rewards(queue, [[[n] * 3000 for n in (1, 2)]])

        calls = [asyncio.create_task(ask(name)) for name in "abc"]
        await settle()
        replicas.open.set()
        await asyncio.gather(*calls)
        assert len(seen) > 2
        assert set(seen) == {"none"}

    asyncio.run(run())


def test_those_who_hang_up_behind_a_patient_caller_leave_nothing() -> None:
    async def run() -> None:
        replicas = Replicas()
        queue = dispatcher(replicas)
        patient = [asyncio.create_task(rewards(queue, [[[n] * 5000]])) for n in range(3)]
        await settle()
        for _ in range(20):
            calls = [asyncio.create_task(rewards(queue, [[[7] * 10]])) for _ in range(50)]
            await settle()
            for call in calls:
                call.cancel()
            await settle()
        assert len(queue._waiting) <= 100
        assert queue._waiting.size == 5000
        replicas.open.set()
        assert [await call for call in patient] == [[0.0], [5000.0], [10000.0]]
        assert queue._waiting.size == 0

    asyncio.run(run())


def test_what_failed_at_a_replica_fails_for_every_caller_of_the_message() -> None:
    def fails(message: FlatSequences) -> ReplicaReply:
        return reply(message, status="failed", raw_scores=None, reason="out of memory")

    def broken(message: FlatSequences) -> ReplicaReply:
        raise RuntimeError("a bug")

    async def run() -> None:
        with pytest.raises(RewardServiceError, match="out of memory"):
            await rewards(dispatcher(Replicas(fails)), [[[5]]])
        replicas = Replicas(broken)
        replicas.open.set()
        queue = dispatcher(replicas)
        with pytest.raises(RuntimeError, match="a bug"):
            await rewards(queue, [[[5]]])
        assert await rewards(queue, [[[6]]]) == [6.0], "and the queue goes on"

    asyncio.run(run())


def test_an_overloaded_replica_is_asked_again() -> None:
    def full(message: FlatSequences) -> ReplicaReply:
        return reply(message, status="overloaded", raw_scores=None, retry_after_s=0.01)

    async def run() -> None:
        replicas = Replicas(full, full)
        replicas.open.set()
        assert await rewards(dispatcher(replicas), [[[5]]]) == [5.0]

    asyncio.run(run())


def test_what_callers_hang_up_on_is_dropped() -> None:
    async def run() -> None:
        replicas = Replicas()
        queue = dispatcher(replicas)
        calls = [asyncio.create_task(rewards(queue, [[[n] * 10]])) for n in range(20)]
        await settle()
        for call in calls[:19]:
            call.cancel()
        await settle()
        assert replicas.cancelled == 2, "the messages on their way had no other callers"
        assert queue.queued_tokens == 10
        replicas.open.set()
        assert await calls[19] == [190.0]
        assert sum(len(m.rows()) for m in replicas.messages) == 3

    asyncio.run(run())


def test_a_message_with_callers_left_is_not_taken_back() -> None:
    async def run() -> None:
        replicas = Replicas()
        queue = dispatcher(replicas)
        first = [asyncio.create_task(rewards(queue, [[[n]]])) for n in (1, 2)]
        await settle()
        merged = [asyncio.create_task(rewards(queue, [[[n]]])) for n in (3, 4)]
        await settle()
        first[0].cancel()
        await settle()  # there is room for the two that wait
        merged[0].cancel()
        replicas.open.set()
        assert await merged[1] == [4.0]
        assert await first[1] == [2.0]

    asyncio.run(run())


def test_a_full_queue_refuses_by_tokens_and_by_time() -> None:
    async def run(**limit: Any) -> float:
        replicas = Replicas()
        queue = dispatcher(replicas, **limit)
        waiting = asyncio.create_task(rewards(queue, [[[1] * 900]]))
        await settle()
        with pytest.raises(RewardServiceError) as refused:
            await rewards(queue, [[[1] * 200]])
        small = asyncio.create_task(rewards(queue, [[[1] * 50]]))
        replicas.open.set()
        await asyncio.gather(waiting, small)
        large = await rewards(queue, [[[1] * 5000]])
        assert large == [5000.0], "an empty queue takes everything"
        assert refused.value.type == "overloaded"
        assert refused.value.retryable
        assert refused.value.retry_after_s is not None
        return refused.value.retry_after_s

    # 10,000 tokens/s: the first guess, which these replicas confirm
    assert asyncio.run(run(max_queued_tokens=1000)) == pytest.approx(0.1)
    assert asyncio.run(run(max_queue_s=0.1)) == pytest.approx(0.1)
    # Two ingresses share the replicas, and each may fill its half of their time.
    assert asyncio.run(run(max_queue_s=0.2, num_ingress=2)) == pytest.approx(0.1)


def test_what_reaches_a_replica_that_sleeps_goes_to_another_until_all_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dispatch, "_FOLLOW_S", 0.0)  # one that is late to wake is waited for

    def asleep(message: FlatSequences) -> ReplicaReply:
        return reply(message, status="asleep", raw_scores=None)

    async def run() -> None:
        replicas = Replicas(asleep, asleep)
        replicas.open.set()
        queue = dispatcher(replicas)
        assert await rewards(queue, [[[1, 2]]]) == [3.0]
        replicas = Replicas(asleep, asleep, asleep)
        queue = dispatcher(replicas)
        queue.is_asleep = True
        calls = [asyncio.create_task(rewards(queue, [[[n]]])) for n in range(8)]
        for call in calls:
            with pytest.raises(RewardServiceError, match="POST /v1/admin/wake") as refused:
                await call
            assert (refused.value.type, refused.value.retry_after_s) == ("asleep", 1.0)
        sizes = [len(message.rows()) for message in replicas.messages]
        assert sizes == [1, 1, 6], "a message is not halved"

    asyncio.run(run())
