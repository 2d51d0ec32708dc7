"""Endpoints that fail, are overloaded or slow: what a client makes of it."""

from __future__ import annotations

import asyncio
import re
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from isolation import free_port
from stub_service import Answer, Behaviour, Received, error, stub

from reward_actor import AsyncRewardClient, RewardClient
from reward_actor.client import connection
from reward_actor.errors import RewardServiceError


def answers(*each: Answer | None) -> Behaviour:
    """One after the other, then scores."""
    left = list(each)
    return lambda _: left.pop(0) if left else None


def nobody() -> str:
    """An address where nobody listens."""
    return f"http://127.0.0.1:{free_port()}"


# ---- retries


@pytest.mark.parametrize(
    "failures",
    [
        [error("unavailable"), error("internal"), Answer(502, b"<html>")],
        [error("overloaded")],
        [error("deadline_exceeded")],
        [Answer(200, b"{}" * 100, hang_up=0), Answer(200, b"{}" * 100, hang_up=50)],
    ],
    ids=["5xx", "429", "504", "closed connections"],
)
def test_what_passes_is_tried_again(failures: list[Answer]) -> None:
    with stub(answers(*failures)) as server, RewardClient(server.url) as client:
        assert client.score("p", ["xyz"]).rewards == [3.0]
        assert len(server.received) == len(failures) + 1


def test_retry_after_is_honoured() -> None:
    for is_date in (False, True):
        then = datetime.now(UTC) + timedelta(seconds=3)
        header = format_datetime(then, usegmt=True) if is_date else "1"
        with (
            stub(answers(error("overloaded", Retry_After=header))) as server,
            RewardClient(server.url) as client,
        ):
            started = time.monotonic()
            assert client.score("p", ["xyz"]).rewards == [3.0]
            assert 0.9 < time.monotonic() - started < 4


def test_other_calls_wait_for_an_overloaded_service_too() -> None:
    with (
        stub(answers(error("overloaded", Retry_After="1"))) as server,
        RewardClient(server.url) as client,
        ThreadPoolExecutor(2) as threads,
    ):
        started = time.monotonic()
        first = threads.submit(client.score, "p", ["x"])
        while not server.received:
            time.sleep(0.01)
        time.sleep(0.1)
        threads.submit(client.score, "p", ["xy"]).result()
        assert time.monotonic() - started > 0.9
        first.result()


def test_a_pause_beyond_the_deadline_is_not_begun() -> None:
    busy = error("overloaded", Retry_After="60")
    with stub(lambda _: busy) as server, RewardClient(server.url, timeout_s=5) as client:
        started = time.monotonic()
        for _ in range(2):  # the second learns it from the first
            with pytest.raises(RewardServiceError) as overloaded:
                client.score("p", ["x"])
            assert overloaded.value.type == "overloaded"
            assert overloaded.value.retry_after_s == 60
            assert overloaded.value.retryable
        assert time.monotonic() - started < 2
        assert len(server.received) == 1


# ---- the deadline


def drip(port_is: Callable[[int], None], stop: threading.Event) -> None:
    """A server that answers a byte at a time, for ever."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(0.1)
        port_is(listening.getsockname()[1])
        while not stop.is_set():
            try:
                connection, _ = listening.accept()
            except TimeoutError:
                continue
            with connection:
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
                try:
                    while not stop.wait(0.05):
                        connection.sendall(b"x")
                except OSError:
                    continue


def test_the_deadline_is_that_of_the_whole_call() -> None:
    ports: list[int] = []
    stop = threading.Event()
    server = threading.Thread(target=drip, args=(ports.append, stop))
    server.start()
    while not ports:
        time.sleep(0.01)
    started = time.monotonic()
    with (
        RewardClient(f"http://127.0.0.1:{ports[0]}", timeout_s=0.6) as client,
        pytest.raises(RewardServiceError) as late,
    ):
        client.score("p", ["x"])
    stop.set()
    server.join()
    assert late.value.type == "deadline_exceeded"
    assert 0.5 < time.monotonic() - started < 2


@pytest.mark.parametrize("behaviour", ["nobody", "503", "slow"])
def test_a_call_ends_in_time_with_what_kept_it(behaviour: str) -> None:
    with ExitStack() as stack:
        if behaviour == "nobody":
            url, type_ = nobody(), "unavailable"
        elif behaviour == "503":
            url, type_ = (
                stack.enter_context(stub(lambda _: error("unavailable"))).url,
                "unavailable",
            )
        else:
            url = stack.enter_context(stub(lambda _: time.sleep(2))).url
            type_ = "deadline_exceeded"

        async def calls() -> list[object]:
            async with AsyncRewardClient(url, timeout_s=0.7, max_concurrency=1) as client:
                first = [client.score("p", ["x"]) for _ in range(3)]
                return await asyncio.gather(*first, return_exceptions=True)

        started = time.monotonic()
        results = asyncio.run(calls())
        assert time.monotonic() - started < 1.5
    for result in results:
        assert isinstance(result, RewardServiceError)
        assert result.type == type_
        assert result.retryable


# ---- a service that is away


def full() -> tuple[socket.socket, list[socket.socket], str]:
    """A listener that takes no connection any more: what is sent to it is never answered."""
    listening = socket.create_server(("127.0.0.1", 0), backlog=0)
    address = listening.getsockname()
    waiting = [socket.socket() for _ in range(3)]
    for each in waiting:
        each.setblocking(False)
        each.connect_ex(address)
    return listening, waiting, f"http://127.0.0.1:{address[1]}"


def test_what_is_waited_for_is_told_once_and_until_when(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(connection, "_TELL_AFTER_S", 0.2)
    url = nobody()

    async def calls() -> list[object]:
        async with AsyncRewardClient(url, timeout_s=1.5) as client:
            both = [client.score("p", ["x"]), client.info()]
            return await asyncio.gather(*both, return_exceptions=True)

    for failure in asyncio.run(calls()):
        assert isinstance(failure, RewardServiceError)
        assert "\n" not in str(failure)
        assert f"nothing answers at {url} (" in str(failure)
        assert "`rayward serve MODEL`" in str(failure)
    [told] = caplog.messages
    assert f"nothing answers at {url} (" in told
    assert re.search(r"; trying again until \d\d:\d\d:\d\d \(1 s\)$", told)


def test_an_outage_is_told_again_after_the_service_was_back(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(connection, "_TELL_AFTER_S", 0.0)
    away = error("unavailable")
    with stub(answers(away, away, None, away)) as server, RewardClient(server.url) as client:
        client.score("p", ["x"])
        assert len(caplog.messages) == 1
        client.score("p", ["x"])
    assert [text.partition(";")[0] for text in caplog.messages] == ["as the test wants it"] * 2


def test_whether_anything_answers_is_known_within_five_seconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert connection._CONNECT_S + connection._TELL_AFTER_S <= 5
    with RewardClient(nobody()) as client:
        started = time.monotonic()
        with pytest.raises(RewardServiceError, match="nothing answers at http") as refused:
            client.check_reachable()
        assert time.monotonic() - started < 2
        assert refused.value.type == "unavailable"
    # Something is there, whatever it says.
    for answer in (Answer(200), error("unavailable"), Answer(200, b"{}", hang_up=0)):
        with stub(lambda _, answer=answer: answer) as server:
            for urls in ([server.url], [nobody(), server.url]):
                with RewardClient(urls) as client:
                    client.check_reachable()


def test_an_address_that_swallows_everything_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_CONNECT_S", 0.3)
    listening, waiting, url = full()
    with (
        RewardClient(url) as client,
        pytest.raises(RewardServiceError, match=r"nothing answers at .* \(ConnectTimeout\)"),
    ):
        client.check_reachable()
    for each in (listening, *waiting):
        each.close()


# ---- several endpoints


def test_endpoints_take_turns_and_share_what_waits() -> None:
    with stub() as one, stub() as two:
        for urls in ([one.url, two.url], f"{one.url}, {two.url}/"):
            with RewardClient(urls) as client:
                for _ in range(10):
                    client.score("p", ["x"])
        assert (len(one.received), len(two.received)) == (10, 10)

        async def together() -> None:
            async with AsyncRewardClient([one.url, two.url]) as client:
                await asyncio.gather(*(client.score("p", ["x"]) for _ in range(200)))

        asyncio.run(together())
        assert (one.num_samples[-1], two.num_samples[-1]) == (100, 100)


def test_another_endpoint_is_asked_at_once() -> None:
    for failure in (error("overloaded", Retry_After="30"), error("unavailable")):
        with stub(lambda _, failure=failure: failure) as bad, stub() as good:
            with RewardClient([bad.url, good.url]) as client:
                started = time.monotonic()
                for _ in range(6):
                    assert client.score("p", ["xyz"]).rewards == [3.0]
                assert time.monotonic() - started < 1.5
            assert len(good.received) == 6
            assert len(bad.received) <= 3  # left aside, tried again now and then


def test_an_endpoint_that_nobody_serves_costs_no_call() -> None:
    with stub() as good, RewardClient([nobody(), good.url, nobody()]) as client:
        for n in range(10):
            assert client.score("p", ["x" * n]).rewards == [float(n)]


def test_when_all_are_overloaded_the_first_pause_to_end_is_waited_for() -> None:
    long = error("overloaded", Retry_After="30")
    with stub(lambda _: long) as one, stub(answers(error("overloaded", Retry_After="1"))) as two:
        with RewardClient([one.url, two.url]) as client:
            started = time.monotonic()
            assert client.score("p", ["xyz"]).rewards == [3.0]
            assert 0.9 < time.monotonic() - started < 3
        assert (len(one.received), len(two.received)) == (1, 2)


def test_an_endpoint_that_is_back_gets_its_share_again() -> None:
    is_down = True

    def moody(received: Received) -> Answer | None:
        return error("unavailable") if is_down else None

    with stub(moody) as one, stub() as two, RewardClient([one.url, two.url]) as client:
        for _ in range(5):
            client.score("p", ["x"])
        is_down = False
        deadline = time.monotonic() + 10
        while len(one.received) < 20:
            assert time.monotonic() < deadline
            client.score("p", ["x"])
