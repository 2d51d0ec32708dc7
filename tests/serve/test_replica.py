"""A replica whose device is lost. Without Ray, and without a GPU that could be lost."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from serve.config import ServeConfig
from serve.monitoring.metrics import Recorder
from serve.replica import replica as replica_module
from serve.replica.replica import Replica
from serve.wire import Asleep, FlatSequences, ReplicaReply


class Models:
    """Of one model."""

    generation = 3
    is_asleep = False
    scorer = SimpleNamespace(max_batch_tokens=100)
    current = SimpleNamespace(scorer=scorer)

    def find(self, _: str) -> Models:
        return self

    def check(self) -> None:
        pass

    def retire(self) -> None:
        pass


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
    replica: Any = Replica(config, "replica", models, Recorder(), lambda: None, bool, 1)
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


class Sleepy(Models):
    """Those that know whether they sleep."""

    directory = "/models/one"
    fault: Exception | None = None

    def sleep(self) -> None:
        self.is_asleep = True

    def wake(self) -> None:
        if self.fault is not None:
            raise self.fault
        self.is_asleep = False


def sleepy(sleeps: Callable[[], bool] = bool) -> Any:
    models: Any = Sleepy()
    config = ServeConfig(model="nowhere")
    replica: Any = Replica(config, "replica", models, Recorder(), lambda: None, sleeps, 1)
    replica._describe = lambda _: "what it was"
    return replica


def test_a_replica_finishes_what_it_has_and_refuses_what_comes_while_it_sleeps() -> None:
    class Slow:
        """A batcher that is busy until it is let go."""

        def __init__(self) -> None:
            self.done = asyncio.Event()

        async def idle(self) -> None:
            await self.done.wait()

    async def run() -> None:
        replica = sleepy()
        models = replica._models
        replica._batcher = batcher = Slow()
        message = FlatSequences.of([[5, 6]], "v", 2)
        sleeping = asyncio.create_task(replica.sleep())
        await asyncio.sleep(0)
        assert (await replica.score(message)).status == "asleep", "it would not end otherwise"
        assert not models.is_asleep
        batcher.done.set()
        assert (await sleeping).asleep
        assert await replica.describe() == Asleep("replica", replica._describe(None))
        replica.check_health()
        for fault, told in (
            (ValueError("/models/one: golden sample 0 scores nan"), "the model: golden sample 0"),
            (RuntimeError("CUDA error: out of memory"), "taken by others"),
            (Exception("of an engine's own"), "its log says why"),
        ):
            models.fault = fault
            state = await replica.wake()
            assert state.asleep
            assert told in state.error
            replica.check_health()
        models.fault = None
        assert not (await replica.wake()).asleep
        assert not (await replica.wake()).asleep

    asyncio.run(run())


def test_a_replica_that_was_not_asked_follows_the_service() -> None:
    async def run() -> None:
        sleeps = True
        replica = sleepy(lambda: sleeps)
        await replica.describe()
        async with asyncio.timeout(replica_module._RECONCILE_S / 2):  # at once
            while not replica._models.is_asleep:
                await asyncio.sleep(0.01)
        sleeps = False
        await replica._follow_sleep()
        assert not replica._models.is_asleep

    asyncio.run(run())


def test_a_replica_that_cannot_wake_by_itself_is_replaced() -> None:
    async def run() -> None:
        replica = sleepy()
        await replica.sleep()
        replica._models.fault = ValueError("no such file")
        await replica._follow_sleep()
        with pytest.raises(RuntimeError, match="could not wake: no such file"):
            replica.check_health()

    asyncio.run(run())


def test_a_replica_whose_device_is_lost_while_it_sleeps_is_replaced() -> None:
    async def run() -> None:
        replica = sleepy()
        await replica.sleep()
        replica._models.fault = RuntimeError("CUDA error: an illegal memory access")
        assert (await replica.wake()).error is not None
        with pytest.raises(RuntimeError, match="CUDA error"):
            replica.check_health()

    asyncio.run(run())
