"""Endpoints that start late or are killed, in processes of their own: what a client makes of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

import pytest
import stub_service
from isolation import free_port

from reward_actor import RewardClient
from reward_actor.errors import RewardServiceError

pytestmark = pytest.mark.process


def test_an_endpoint_that_starts_late_is_waited_for() -> None:
    port = free_port()

    def start() -> None:
        time.sleep(0.5)
        with process(port):
            done.wait(20)

    done = threading.Event()
    starter = threading.Thread(target=start)
    starter.start()
    with RewardClient(f"http://127.0.0.1:{port}", timeout_s=60) as client:
        assert client.score("p", ["xyz"]).rewards == [3.0]
    done.set()
    starter.join()


@contextmanager
def process(port: int) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, stub_service.__file__, str(port)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as server:
        try:
            assert server.stdout is not None
            assert server.stdout.readline().startswith("http://")
            yield server
        finally:
            server.kill()


def test_a_killed_endpoint_loses_nothing() -> None:
    """Under load from threads one of two servers is killed and started again, then the other."""
    ports = [free_port(), free_port()]
    failures: list[str] = []
    num_right = 0
    stop = threading.Event()

    def hammer(client: RewardClient) -> None:
        nonlocal num_right
        n = 0
        while not stop.is_set():
            n += 1
            try:
                rewards = client.score("p", ["x" * (n % 50)]).rewards
            except RewardServiceError as error:
                failures.append(str(error))
                continue
            if rewards != [float(n % 50)]:
                failures.append(f"wrong: {rewards}")
            num_right += 1

    def work(num: int) -> None:
        before = num_right
        deadline = time.monotonic() + 30
        while num_right < before + num:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    urls = [f"http://127.0.0.1:{port}" for port in ports]
    with RewardClient(urls, timeout_s=60) as client, ThreadPoolExecutor(8) as threads:
        try:
            with process(ports[0]) as one, process(ports[1]):
                hammers = [threads.submit(hammer, client) for _ in range(8)]
                work(100)
                os.kill(one.pid, signal.SIGKILL)
                work(100)
                with process(ports[0]):
                    work(100)
                    work(100)
                    stop.set()
                    wait(hammers)  # the last requests are answered before the servers go
        finally:
            stop.set()
    assert failures == []
