"""Replicas come with queued tokens and go without, down to none."""

from __future__ import annotations

import contextlib
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import numpy as np
import pytest
from service_process import Service

if TYPE_CHECKING:
    from nursery import Nursery

pytestmark = pytest.mark.process


def test_replicas_follow_the_queue_up_and_down_to_none(nursery: Nursery, slow_export: Path) -> None:
    # The delay down is longer than this test may take from "ready" to its first look.
    options = "--min-replicas 0 --max-replicas 2 --target-queue-s 0.5 --upscale-delay-s 1"
    options += " --downscale-delay-s 10"
    with Service(nursery.python, slow_export, *options.split()) as service:
        assert len(service.replica_pids()) == 1
        stop = threading.Event()

        def load(seed: int) -> None:
            random = np.random.default_rng(seed)
            with httpx.Client(base_url=service.url, timeout=120) as http:
                while not stop.is_set():
                    ids = random.integers(5, 300, (40, 200)).tolist()
                    body = {"groups": [{"prompt_ids": [5], "completion_ids": ids}]}
                    assert http.post("/v1/score", json=body).status_code == 200

        clients = [threading.Thread(target=load, args=(seed,)) for seed in range(3)]
        for client in clients:
            client.start()
        try:
            wait_for(service, 2)
        finally:
            stop.set()
            for client in clients:
                client.join()
        wait_for(service, 0)
        with httpx.Client(base_url=service.url, timeout=120) as http:
            assert http.get("/health").status_code == 200
            body = {"groups": [{"prompt_ids": [5], "completion_ids": [[6]]}]}
            reply = http.post("/v1/score", json=body)
            assert reply.status_code == 200, "the first request after a pause brings one back"
        wait_for(service, 1)


def wait_for(service: Service, num_replicas: int) -> None:
    deadline = time.monotonic() + 90
    while len(service.replica_pids()) != num_replicas:
        assert time.monotonic() < deadline, f"not {num_replicas} replicas in time"
        with contextlib.suppress(httpx.HTTPError):
            httpx.get(f"{service.url}/health", timeout=10)
        time.sleep(0.5)
