"""The clients over real HTTP, to a small server: what travels, merged calls, typed errors."""

from __future__ import annotations

import asyncio
import json
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from samples import GROUPS, IDS
from stub_service import Answer, Received, error, expected_rewards, stub

from reward_actor import AsyncRewardClient, Group, RewardClient, binary
from reward_actor.errors import RewardServiceError
from reward_actor.groups import Whole

# ---- what travels, and how it is merged


def test_token_ids_travel_in_the_binary_body_and_text_as_json() -> None:
    with stub() as server, RewardClient(server.url) as client:
        for groups in (IDS, GROUPS, GROUPS[:1]):
            rewards = [group.rewards for group in client.score_groups(groups)]
            assert rewards == [expected_rewards(group) for group in groups]
        assert client.score_groups([]) == []
    media_types = [received.media_type for received in server.received]
    assert media_types == [binary.MEDIA_TYPE, "application/json", "application/json"]


def test_calls_made_together_travel_together() -> None:
    with stub() as server:

        async def together() -> None:
            async with AsyncRewardClient(server.url) as client:
                calls = [client.score("p", ["x" * n]) for n in range(100)]
                scores = await asyncio.gather(*calls)
            assert [score.rewards for score in scores] == [[float(n)] for n in range(100)]

        asyncio.run(together())
        assert server.num_samples == [100]


def test_what_waits_goes_out_as_soon_as_a_request_is_done() -> None:
    """No timer: the first call leaves at once, those that come meanwhile leave together."""
    release = threading.Event()
    first = threading.Event()

    def hold(received: Received) -> None:
        first.set()
        release.wait(10)

    with stub(hold) as server:

        async def calls() -> None:
            async with AsyncRewardClient(server.url, max_concurrency=1) as client:
                early = asyncio.create_task(client.score("p", ["early"]))
                await asyncio.to_thread(first.wait, 10)
                late = []
                for n in range(20):
                    late.append(asyncio.create_task(client.score("p", ["x" * n])))
                    await asyncio.sleep(0)
                release.set()
                await early
                scores = await asyncio.gather(*late)
            assert [score.rewards for score in scores] == [[float(n)] for n in range(20)]

        asyncio.run(calls())
        assert server.num_samples == [1, 20]


def test_threads_are_merged_too() -> None:
    with (
        stub(lambda _: time.sleep(0.05)) as server,
        RewardClient(server.url, max_concurrency=1) as client,
        ThreadPoolExecutor(16) as threads,
    ):
        scores = list(threads.map(lambda n: client.score("p", ["x" * n]), range(64)))
    assert [score.rewards for score in scores] == [[float(n)] for n in range(64)]
    assert sum(server.num_samples) == 64
    assert len(server.received) < 20


def test_calls_that_want_token_rewards_travel_apart() -> None:
    with stub() as server:

        async def mixed() -> None:
            async with AsyncRewardClient(server.url) as client:
                calls = [client.score("p", ["x"], token_rewards=n % 2 == 0) for n in range(10)]
                scores = await asyncio.gather(*calls)
            assert [s.token_rewards is not None for s in scores] == [True, False] * 5

        asyncio.run(mixed())
        assert sorted(r.token_rewards for r in server.received) == [False, True]
        assert server.num_samples == [5, 5]


def test_calls_that_want_turn_rewards_travel_apart_and_in_json() -> None:
    prompt = [{"role": "user", "content": "p"}, {"role": "assistant", "content": "four"}]
    with stub() as server, RewardClient(server.url) as client:
        [scores] = client.score_groups([Group(prompt, ["x", "xy"])], turn_rewards=True)
        assert scores.turn_rewards == [[4.0, 1.0], [4.0, 2.0]]
        assert scores.token_rewards is None
        assert client.score("p", ["x"]).turn_rewards is None
        client.score_groups([Group(prompt_ids=[1], completion_ids=[[2]])], turn_rewards=True)
    assert [received.turn_rewards for received in server.received] == [True, False, True]
    # A service from before it refuses the field.
    assert b"turn_rewards" not in server.received[1].body


def test_connections_are_kept() -> None:
    with stub() as server, RewardClient(server.url) as client:
        for _ in range(5):
            client.score("p", ["x"])
    assert len({received.connection for received in server.received}) == 1


def refuse_bad(received: Received) -> Answer | None:
    is_bad = any(isinstance(g, Group) and g.prompt == "bad" for g in received.groups)
    return error("invalid_request") if is_bad else None


def test_only_the_guilty_call_of_a_refused_request_gets_the_error() -> None:
    with stub(refuse_bad) as server:

        async def calls() -> list[Any]:
            async with AsyncRewardClient(server.url) as client:
                prompts = ["bad" if n in (3, 11) else "good" for n in range(20)]
                calls = [client.score(prompt, ["x"]) for prompt in prompts]
                # An id that no body can hold is refused here already.
                calls.append(client.score_groups([Group(prompt_ids=[2**40], completion_ids=[[1]])]))
                calls.append(client.score_groups(IDS))
                return await asyncio.gather(*calls, return_exceptions=True)

        results = asyncio.run(calls())
    failed = {n: type(result) for n, result in enumerate(results) if isinstance(result, Exception)}
    assert failed == {3: RewardServiceError, 11: RewardServiceError, 20: ValueError}
    assert results[3] is not results[11]


def test_an_error_names_the_group_of_the_call() -> None:
    def refuse_last(received: Received) -> Answer | None:
        is_last = any(isinstance(g, Group) and g.prompt == "last" for g in received.groups)
        return error("invalid_request") if is_last else None

    groups = [Group("p", ["x"] * 600), Group("p", ["x"] * 600), Group("last", ["x"])]
    with (
        stub(refuse_last) as server,
        RewardClient(server.url) as client,
        pytest.raises(RewardServiceError) as refused,
    ):
        client.score_groups(groups)
    assert refused.value.index == 1  # the stub says 0, of a request that began with group 1


def test_a_cancelled_call_leaves_the_others_alone() -> None:
    started = threading.Event()

    def slow(received: Received) -> None:
        started.set()
        time.sleep(0.3)

    with stub(slow) as server:

        async def calls() -> None:
            async with AsyncRewardClient(server.url) as client:
                tasks = [asyncio.create_task(client.score("p", ["x" * n])) for n in range(10)]
                await asyncio.to_thread(started.wait, 10)
                tasks[4].cancel()
                scores = await asyncio.gather(*tasks, return_exceptions=True)
            assert isinstance(scores.pop(4), asyncio.CancelledError)
            assert [s.rewards[0] for s in scores] == [n for n in range(10) if n != 4]

        asyncio.run(calls())
        assert server.num_samples == [10]


def test_a_request_that_nobody_waits_for_is_given_up() -> None:
    started = threading.Event()
    release = threading.Event()

    def hold(received: Received) -> None:
        started.set()
        release.wait(10)

    with stub(hold) as server:

        async def call() -> None:
            async with AsyncRewardClient(server.url) as client:
                task = asyncio.create_task(client.score("p", ["x"]))
                await asyncio.to_thread(started.wait, 10)
                task.cancel()
                [calls] = client._calls.values()
                while calls._requests:
                    await asyncio.sleep(0.01)

        asyncio.run(asyncio.wait_for(call(), 5))
        release.set()


# ---- errors


@pytest.mark.parametrize(
    ("type_", "status"),
    [
        ("unauthenticated", 401),
        ("forbidden", 403),
        ("not_found", 404),
        ("body_too_large", 413),
        ("invalid_request", 422),
    ],
)
@pytest.mark.parametrize("is_ours", [True, False])
def test_what_no_retry_mends_is_raised_at_once(type_: str, status: int, is_ours: bool) -> None:
    page = error(type_) if is_ours else Answer(status, b"<html>canary</html>")
    with stub(lambda _: page) as server, RewardClient(server.url) as client:
        with pytest.raises(RewardServiceError) as refused:
            client.score("p", ["x"])
        assert len(server.received) == 1
    assert (refused.value.type, refused.value.retryable) == (type_, False)
    assert "canary" not in str(refused.value)
    again = pickle.loads(pickle.dumps(refused.value))
    assert (again.type, again.index) == (type_, refused.value.index)


@pytest.mark.parametrize(
    "body", [b"", b"<html>canary</html>", b'{"model": 1}', b'{"results": []}', b"RWR1\0"]
)
def test_a_reply_that_is_none_is_said_to_be_one(body: bytes) -> None:
    with stub(lambda _: Answer(200, body)) as server, RewardClient(server.url) as client:
        for call in (lambda: client.score("p", ["x"]), client.info):
            with pytest.raises(RewardServiceError, match="is it a Rayward service") as strange:
                call()
            assert "canary" not in str(strange.value)


def test_what_no_body_can_hold_is_refused_before_it_is_sent() -> None:
    with stub() as server, RewardClient(server.url) as client:
        for group in (
            Whole(ids=[[1]]),
            Whole(["x"], max_tokens=3),
        ):
            with pytest.raises(ValueError, match=r"travel"):
                client.score_groups([group])
    assert server.received == []


# ---- models


def admin(received: Received) -> Answer:
    if received.method == "GET":
        return Answer(200, b'{"models": ["a", "b"], "current": "a"}')
    assert received.body == b'{"model":"b"}'
    reply = b'{"model": "b", "model_version": "v", "generation": 2, "num_replicas": 1}'
    return Answer(200, reply)


def test_models_are_listed_and_swapped() -> None:
    with stub(admin) as server, RewardClient(server.url) as client:
        assert client.models().models == ["a", "b"]
        assert client.swap("b").generation == 2
    client = RewardClient([server.url, "http://127.0.0.1:1"])
    with pytest.raises(ValueError, match="2 addresses"):
        client.swap("b")


def test_a_service_is_put_to_sleep_and_woken() -> None:
    def admin(received: Received) -> Answer:
        asleep = received.path == "/v1/admin/sleep"
        state = {"replica": "r", "asleep": asleep, "seconds": 0.5, "error": None}
        reply = {"asleep": asleep, "seconds": 1.0, "replicas": [state]}
        return Answer(200, json.dumps(reply).encode())

    with stub(admin) as server, RewardClient(server.url) as client:
        assert client.sleep().replicas[0].asleep
        assert not client.wake().asleep
    assert [(each.method, each.path) for each in server.received] == [
        ("POST", "/v1/admin/sleep"),
        ("POST", "/v1/admin/wake"),
    ]
    client = RewardClient([server.url, "http://127.0.0.1:1"])
    with pytest.raises(ValueError, match="2 addresses"):
        client.wake()


def test_a_call_waits_for_a_service_that_sleeps_and_says_so_in_the_end(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reward_actor.client.connection._TELL_AFTER_S", 0.0)
    asleep = error("asleep", **{"Retry-After": "1"})
    with (
        stub(lambda _: asleep) as server,
        RewardClient(server.url, timeout_s=1.5) as client,
        pytest.raises(RewardServiceError) as failed,
    ):
        client.score("Hi.", ["Yes?"])
    assert failed.value.type == "asleep"
    assert len(server.received) == 2
    assert "trying again until" in caplog.text
