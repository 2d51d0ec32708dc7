"""Clients that are closed, dropped, forked, or called from several loops and threads."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from stub_service import Answer, Received, error, stub

from reward_actor import AsyncRewardClient, Group, RewardClient
from reward_actor.client import aio, sync
from reward_actor.client.aio import closed
from reward_actor.client.connection import Sender
from reward_actor.errors import RewardServiceError


def test_close_ends_what_is_under_way_with_an_error() -> None:
    started, release = threading.Event(), threading.Event()

    def hold(received: Received) -> None:
        started.set()
        release.wait(10)

    with stub(hold) as server:
        client = RewardClient(server.url, max_concurrency=1)
        with ThreadPoolExecutor(4) as threads:
            calls = [threads.submit(client.score, "p", ["x"]) for _ in range(4)]
            started.wait(10)
            client.close()
            for call in calls:
                with pytest.raises(RewardServiceError, match="closed"):
                    call.result(timeout=5)
        release.set()
        with pytest.raises(RewardServiceError, match="closed"):
            client.score("p", ["x"])
        client.close()


def divided(started: threading.Event, release: threading.Event) -> Callable[[Received], Any]:
    """Refuses the request of all calls, and holds that of the first half."""

    def behave(received: Received) -> Answer | None:
        if received.num_samples == 4:
            return error("invalid_request")
        started.set()
        release.wait(10)
        return None

    return behave


def test_close_ends_both_halves_of_a_divided_request() -> None:
    started, release = threading.Event(), threading.Event()
    with stub(divided(started, release)) as server:

        async def calls() -> list[Any]:
            client = AsyncRewardClient(server.url, timeout_s=30.0)
            tasks = [asyncio.create_task(client.score("p", ["x"])) for _ in range(4)]
            await asyncio.to_thread(started.wait, 10)
            await client.close()
            return await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 5)

        results = asyncio.run(calls())
        release.set()
    assert [str(result) for result in results] == [str(closed())] * 4
    assert {type(result) for result in results} == {RewardServiceError}


def test_threads_of_a_divided_request_get_the_clients_own_error() -> None:
    started, release, first = threading.Event(), threading.Event(), threading.Event()
    behave = divided(started, release)

    def hold_first(received: Received) -> Answer | None:
        if received.groups == [Group("first", ["x"])]:
            first.set()
            time.sleep(0.3)  # the other four come meanwhile, and go together
            return None
        return behave(received)

    with stub(hold_first) as server, ThreadPoolExecutor(5) as threads:
        client = RewardClient(server.url, timeout_s=30.0, max_concurrency=1)
        early = threads.submit(client.score, "first", ["x"])
        first.wait(10)
        calls = [threads.submit(client.score, "p", ["x"]) for _ in range(4)]
        started.wait(10)
        assert early.result(timeout=5).rewards == [1.0]
        client.close()
        for call in calls:
            with pytest.raises(RewardServiceError, match="closed"):
                call.result(timeout=5)
        release.set()


@pytest.mark.parametrize("turns", range(4))
def test_close_ends_a_request_that_has_not_begun(turns: int) -> None:
    async def call() -> None:
        client = AsyncRewardClient("http://127.0.0.1:1", timeout_s=30.0)
        task = asyncio.create_task(client.score("p", ["x"]))
        for _ in range(turns):
            await asyncio.sleep(0)
        await client.close()
        with pytest.raises(RewardServiceError, match="closed"):
            await asyncio.wait_for(task, 5)

    asyncio.run(call())


def test_a_thread_that_asks_while_another_closes_gets_the_clients_own_error() -> None:
    started, release = threading.Event(), threading.Event()

    def hold(received: Received) -> None:
        started.set()
        release.wait(10)

    with stub(hold) as server, ThreadPoolExecutor(1) as threads:
        client = RewardClient(server.url)
        asked = threads.submit(client.info)
        started.wait(10)
        client.close()
        with pytest.raises(RewardServiceError, match="closed"):
            asked.result(timeout=5)
        release.set()


@pytest.mark.parametrize("turns", [None, 0, 1])
def test_close_ends_what_is_not_merged(turns: int | None) -> None:
    """Begun some turns of the loop before, or sent; and no connection is opened again."""
    started, release = threading.Event(), threading.Event()

    def hold(received: Received) -> None:
        started.set()
        release.wait(10)

    async def calls(url: str) -> None:
        client = AsyncRewardClient(url, timeout_s=30.0)
        tasks = [asyncio.create_task(call) for call in (client.info(), client.check_reachable())]
        if turns is None:
            await asyncio.to_thread(started.wait, 10)
        for _ in range(turns or 0):
            await asyncio.sleep(0)
        await client.close()
        for task in tasks:
            with pytest.raises(RewardServiceError, match="this client is closed"):
                await asyncio.wait_for(task, 5)

    with stub(hold) as server:
        before = num_sockets()
        asyncio.run(calls(server.url))
        release.set()
        wait_for_sockets(before)


def test_a_caller_that_is_cancelled_is_not_told_of_a_closed_client() -> None:
    async def call() -> None:
        async with AsyncRewardClient("http://127.0.0.1:1") as client:
            task = asyncio.create_task(client.info())
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(call())


def closes_meanwhile(close: Callable[[], None]) -> Callable[[], None]:
    """Have another thread close a client, and give it the time to."""

    def run() -> None:
        closing = threading.Thread(target=close)
        closing.start()
        closing.join(0.3)

    return run


def test_a_call_that_begins_while_another_thread_closes_ends_with_the_clients_own_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    release = threading.Event()

    def hold(received: Received) -> None:
        release.wait(10)

    class SlowlyMade(Sender):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            closes_meanwhile(lambda: asyncio.run(client.close()))()

    monkeypatch.setattr(aio, "Sender", SlowlyMade)
    with stub(hold) as server:
        before = num_sockets()
        client = AsyncRewardClient(server.url)
        with pytest.raises(RewardServiceError, match="this client is closed"):
            asyncio.run(client.score("p", ["x"]))
        release.set()
        wait_for_sockets(before)


def test_a_waiting_call_that_begins_while_another_thread_closes_does_not_wait_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with stub() as server:
        client = RewardClient(server.url, timeout_s=5.0)
        client.score("p", ["x"])

        def slowly(work: Any, loop: Any) -> Any:
            monkeypatch.undo()
            closes_meanwhile(client.close)()
            return asyncio.run_coroutine_threadsafe(work, loop)

        monkeypatch.setattr(sync.asyncio, "run_coroutine_threadsafe", slowly)
        with pytest.raises(RewardServiceError, match="this client is closed"):
            client.score("p", ["x"])


def test_a_close_that_is_cancelled_leaves_no_connection() -> None:
    """As asyncio.run cancels it at its end."""
    started, release = threading.Event(), threading.Event()

    def hold(received: Received) -> None:
        if received.token_rewards:
            started.set()
            release.wait(10)

    async def calls(url: str) -> None:
        before = num_sockets()  # the loop's own among them
        client = AsyncRewardClient(url)
        held = asyncio.create_task(client.token_rewards("p", ["x"]))
        await asyncio.to_thread(started.wait, 10)
        await client.score("p", ["x"])  # over another connection, which is idle from now on
        closing = asyncio.create_task(client.close())
        await asyncio.sleep(0)
        closing.cancel()
        ends = await asyncio.gather(closing, held, return_exceptions=True)
        assert [type(end) for end in ends] == [asyncio.CancelledError, RewardServiceError]
        release.set()
        await asyncio.to_thread(wait_for_sockets, before)

    with stub(hold) as server:
        asyncio.run(calls(server.url))


def test_a_client_that_is_dropped_takes_its_thread_along() -> None:
    with stub() as server:
        before = set(threading.enumerate())  # other tests' clients among them
        RewardClient(server.url).score("p", ["x"])
        deadline = time.monotonic() + 5
        while any(t.name == "reward-client" for t in set(threading.enumerate()) - before):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert len(set(threading.enumerate()) - before) <= 2  # the server's connections


@contextmanager
def loops_in_threads(count: int) -> Iterator[list[asyncio.AbstractEventLoop]]:
    """Running ones, as each of a process's trainers keeps one."""
    loops = [asyncio.new_event_loop() for _ in range(count)]
    threads = [threading.Thread(target=loop.run_forever) for loop in loops]
    for thread in threads:
        thread.start()
    try:
        yield loops
    finally:
        for loop, thread in zip(loops, threads, strict=True):
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()


def score_in(loop: asyncio.AbstractEventLoop, client: AsyncRewardClient) -> list[float | None]:
    return asyncio.run_coroutine_threadsafe(client.score("p", ["xy"]), loop).result(10).rewards


def num_sockets() -> int:
    """Of this process, the server's ends of connections among them."""
    found = 0
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the listing's own
            found += os.readlink(f"/proc/self/fd/{name}").startswith("socket:")
    return found


def wait_for_sockets(most: int) -> None:
    deadline = time.monotonic() + 5
    while (num := num_sockets()) > most:
        assert time.monotonic() < deadline, f"{num} sockets are open, {most} were expected"
        time.sleep(0.01)


def test_an_async_client_leaves_no_sockets_in_loops_that_have_ended() -> None:
    with stub() as server:
        client = AsyncRewardClient(server.url)
        before = num_sockets()
        for _ in range(20):
            assert asyncio.run(client.score("p", ["xy"])).rewards == [2.0]
        wait_for_sockets(before)
        assert len({got.connection for got in server.received}) == 20


def test_an_async_client_leaves_no_sockets_in_loops_that_are_idle() -> None:
    """Those of earlier trainers, or of cells of a notebook."""
    with stub() as server, loops_in_threads(20) as loops:
        client = AsyncRewardClient(server.url)
        before = num_sockets()
        for loop in [*loops, loops[0]]:
            assert score_in(loop, client) == score_in(loop, client) == [2.0]
        wait_for_sockets(before + 2)  # both ends of the last loop's connection
        asyncio.run_coroutine_threadsafe(client.close(), loops[1]).result(10)
        wait_for_sockets(before)
        for loop in loops[:2]:
            with pytest.raises(RewardServiceError, match="closed"):
                score_in(loop, client)


def test_an_async_client_is_used_in_loops_that_stop_and_run_again() -> None:
    with stub() as server:
        client = AsyncRewardClient(server.url)
        loops = [asyncio.new_event_loop() for _ in range(2)]
        for loop in loops * 2:
            assert loop.run_until_complete(client.score("p", ["xy"])).rewards == [2.0]
        for loop in loops:
            loop.run_until_complete(loop.shutdown_asyncgens())
            assert loop.run_until_complete(client.score("p", ["xy"])).rewards == [2.0]
            loop.run_until_complete(client.close() if loop is loops[1] else asyncio.sleep(0))
            loop.close()


def test_loops_that_call_at_the_same_time_do_not_disturb_each_other() -> None:
    both = threading.Barrier(2)

    def hold(received: Received) -> None:
        if received.groups == [Group("together", ["xy"])]:
            both.wait(10)

    with stub(hold) as server, loops_in_threads(2) as loops:
        client, before = AsyncRewardClient(server.url), num_sockets()
        for _ in range(20):
            calls = [
                asyncio.run_coroutine_threadsafe(client.score("together", ["xy"]), loop)
                for loop in loops
            ]
            assert [call.result(10).rewards for call in calls] == [[2.0]] * 2
        assert len({got.connection for got in server.received}) == 2
        asyncio.run(client.close())
        wait_for_sockets(before)


def test_a_client_that_is_dropped_leaves_no_sockets() -> None:
    with stub() as server:
        before = num_sockets()
        RewardClient(server.url).score("p", ["x"])
        wait_for_sockets(before)


@pytest.mark.process
def test_a_client_works_in_a_process_that_is_forked_off() -> None:
    with stub() as server, RewardClient(server.url) as client:
        client.score("p", ["x"])
        pid = os.fork()
        if pid == 0:
            is_right = client.score("p", ["xyz"]).rewards == [3.0]
            os._exit(0 if is_right else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert client.score("p", ["xy"]).rewards == [2.0]


def test_a_call_inside_a_running_loop_is_possible() -> None:
    """In a notebook, say."""
    with stub() as server, RewardClient(server.url) as client:

        async def blocking() -> list[float | None]:
            return client.score("p", ["xyz"]).rewards

        assert asyncio.run(blocking()) == [3.0]
