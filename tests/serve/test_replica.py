"""A replica whose device is lost. Without Ray, and without a GPU that could be lost."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from serve.config import ServeConfig
from serve.monitoring.metrics import Recorder
from serve.replica.replica import Replica
from serve.wire import FlatSequences, ReplicaReply


class Models:
    """Of one model."""

    generation = 3
    scorer = SimpleNamespace(max_batch_tokens=100)
    current = SimpleNamespace(scorer=scorer)

    def find(self, _: str) -> Models:
        return self


class Broken:
    """A batcher whose device says `fault`."""

    def __init__(self, fault: str) -> None:
        self.fault = fault
        self.num_jobs = 0

    async def submit(self, *_: Any) -> None:
        self.num_jobs += 1
        raise RuntimeError(self.fault)


def replica_with(batcher: Broken) -> Any:
    models: Any = Models()
    config = ServeConfig(model="nowhere")
    replica: Any = Replica(config, "replica", models, Recorder(), lambda: None, 1)
    replica._batcher = batcher
    return replica


def ask(replica: Any) -> ReplicaReply:
    reply: ReplicaReply = asyncio.run(replica.score(FlatSequences.of([[5, 6]], "v", 2)))
    return reply


def test_what_a_lost_device_had_goes_to_another_replica() -> None:
    batcher = Broken("CUDA error: an illegal memory access was encountered")
    replica = replica_with(batcher)
    replies = [ask(replica) for _ in range(3)]
    assert [reply.status for reply in replies] == ["lost"] * 3
    assert all(reply.retry_after_s > 0 for reply in replies)
    assert batcher.num_jobs == 1, "it is not tried again"
    with pytest.raises(RuntimeError, match="CUDA error"):
        replica.check_health()


def test_another_fault_is_told_and_the_replica_goes_on() -> None:
    batcher = Broken("shape mismatch")
    replica = replica_with(batcher)
    assert [ask(replica).status for _ in range(2)] == ["failed"] * 2
    assert batcher.num_jobs == 2
    assert replica._fault is None
