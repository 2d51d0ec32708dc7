"""What an ingress knows of its replicas: which model counts, and who is there. Without Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from reward_actor.errors import RewardServiceError
from reward_actor.readout import Readout
from reward_actor.schema import ModelInfo
from serve.ingress import replicas as replicas_module
from serve.ingress.dispatch import ReplicaLost
from serve.ingress.replicas import Model, Replicas
from serve.wire import Asleep, Description, ReplicaReply


def description(replica: str, version: str, generation: int = 0) -> Description:
    return Description(
        replica=replica,
        generation=generation,
        name=f"name of {version}",
        directory="",
        tokenizer="",
        max_batch_tokens=1000,
        contract={},
        readout=Readout.__new__(Readout),
        info=ModelInfo(
            model_version=version,
            dtype="float32",
            path="forest",
            fallback_reason=None,
            format="chat",
            tokenizer_fingerprint="",
            template_date=None,
            normalisation={},
            versions={},
        ),
    )


class Result:
    """Of one replica, when it is waited for."""

    def __init__(self, answer: Description | Asleep | None) -> None:
        self._answer = answer

    async def get_async(self) -> Description | Asleep:
        if self._answer is None:
            await asyncio.sleep(60)
        assert self._answer is not None
        return self._answer


class Handle:
    """replicas: what each says; None for one that does not answer."""

    is_initialized = True

    def __init__(self, *replicas: Description | Asleep | None) -> None:
        self.replicas = list(replicas)
        self.describe = self

    def broadcast(self, *_: Any) -> Handle:
        return self

    async def _fetch_replica_results_async(self) -> list[Result]:
        return [Result(each) for each in self.replicas]


def made(handle: Handle, seen: list[int] | None = None) -> Replicas:
    def count(found: list[Description]) -> None:
        if seen is not None:
            seen.append(len(found))

    return Replicas(handle, "me", trust_remote_code=False, on_refresh=count)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(self: Replicas, described: Description) -> Model:
        return Model(described, None, None)  # type: ignore[arg-type]

    monkeypatch.setattr(Replicas, "_load", load)
    monkeypatch.setattr(replicas_module, "_ANSWER_S", 0.1)
    monkeypatch.setattr(replicas_module, "_OTHER_S", 0.3)


def run(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(work(), 20))


class Call:
    """A call to a replica; `ended` by Ray, or by whoever waits for it."""

    def __init__(self) -> None:
        self.answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def remote(self, *_: Any) -> Call:
        return self

    def cancel(self) -> None:
        self.answer.cancel()

    def __await__(self) -> Any:
        return self.answer.__await__()


async def under_way() -> tuple[Call, asyncio.Task[ReplicaReply]]:
    handle = Handle()
    handle.score = call = Call()  # type: ignore[attr-defined]
    sent = asyncio.create_task(made(handle).send(None, False))  # type: ignore[arg-type]
    await asyncio.sleep(0)
    return call, sent


def test_a_call_that_ray_ends_goes_to_another_replica() -> None:
    async def work() -> None:
        call, sent = await under_way()
        call.answer.cancel()
        with pytest.raises(ReplicaLost):
            await sent

    run(work)


def test_a_call_that_nobody_waits_for_is_cancelled() -> None:
    async def work() -> None:
        call, sent = await under_way()
        sent.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sent
        assert call.answer.cancelled()

    run(work)


def test_the_highest_generation_counts() -> None:
    async def work() -> None:
        replicas = made(Handle(description("a", "A", 1), description("b", "B", 2)))
        assert (await replicas.model()).version == "B"

    run(work)


def test_a_redeployment_with_another_model_is_followed() -> None:
    """Both are of generation 0: what was current stays so until no replica holds it."""

    async def work() -> None:
        handle = Handle(description("old", "A"), description("new", "C"))
        replicas = made(handle)
        first = await replicas.model()
        assert first.version == "A"
        assert (await replicas.refresh()) is first
        other = await replicas.model(other_than=first)  # a new replica has refused it
        assert other.version == "C"
        handle.replicas = [description("new", "C"), description("newer", "C")]
        assert (await replicas.refresh()) is other

    run(work)


def test_what_replicas_have_refused_comes_back_when_it_is_all_they_hold() -> None:
    async def work() -> None:
        replicas = made(Handle(description("a", "A")))
        model = await replicas.model()
        assert await replicas.model(other_than=model) is model

    run(work)


def test_one_silent_replica_does_not_make_the_others_look_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(replicas_module, "_KEEP_S", 0.5)

    async def work() -> None:
        seen: list[int] = []
        handle = Handle(*(description(name, "A") for name in "abc"))
        replicas = made(handle, seen)
        await replicas.refresh()
        handle.replicas[1] = None
        await replicas.refresh()
        assert seen == [3, 3], "it may have missed one turn"
        await asyncio.sleep(0.5)
        await replicas.refresh()
        assert seen[2] == 2, "it has been silent for too long"
        answers = await replicas.ask_all("activate", timeout_s=0.1)
        assert [isinstance(each, Exception) for each in answers] == [False, True, False]

    run(work)


def test_a_service_is_asleep_when_no_replica_is_awake() -> None:
    async def work() -> None:
        handle = Handle(description("a", "A"), description("b", "A"))
        replicas = made(handle)
        model = await replicas.model()
        handle.replicas[0] = Asleep("a")
        await replicas.refresh()
        assert not replicas.is_asleep, "the other one scores"
        handle.replicas[1] = Asleep("b")
        assert await replicas.refresh() is model, "it is known what sleeps"
        assert (replicas.is_asleep, replicas.num_asleep) == (True, 2)
        with pytest.raises(RewardServiceError, match="POST /v1/admin/wake"):
            await replicas.model(other_than=model)
        newcomer = made(handle)
        assert await newcomer.refresh() is None
        with pytest.raises(RewardServiceError, match="asleep"):
            await newcomer.model()
        handle.replicas[1] = Asleep("b", description("b", "A"))
        known = await newcomer.refresh()
        assert known is not None, "/info says what sleeps"
        assert (known.version, newcomer.is_asleep) == ("A", True)
        handle.replicas = [description("a", "A"), description("b", "A")]
        assert await replicas.refresh() is model
        assert not replicas.is_asleep

    run(work)
