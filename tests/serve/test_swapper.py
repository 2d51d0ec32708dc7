"""Swaps, sleep and wake at an ingress: what is remembered, and what is undone. Without Ray."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError

from reward_actor.errors import RewardServiceError
from reward_actor.readout import Readout
from reward_actor.schema import ReplicaState, SleepReply
from serve.config import ServeConfig
from serve.current_model import Sleep
from serve.ingress import swap
from serve.ingress.functions import Functions
from serve.ingress.swap import Swapper
from serve.wire import Description

SLEEP = Sleep(3, "v")


class Replicas:
    """Those that answer each method as given, and else as they should."""

    def __init__(self, **answers: list[Any]) -> None:
        self.asked: list[str] = []
        self._answers = answers

    async def refresh(self) -> Any:
        return SimpleNamespace(generation=SLEEP.generation, version=SLEEP.version)

    async def ask_all(self, method: str, *_: Any, **__: float) -> list[Any]:
        self.asked.append(method)
        return self._answers.get(method, [state(method)])


def state(method: str, error: str | None = None) -> ReplicaState:
    return ReplicaState(replica="a", asleep=method == "sleep", seconds=0.0, error=error)


@pytest.fixture(autouse=True)
def remembered(monkeypatch: pytest.MonkeyPatch) -> dict[str, Sleep]:
    """What the cluster remembers, by start."""
    kept: dict[str, Sleep] = {}
    monkeypatch.setattr(Sleep, "get", lambda _, start: kept.get(start))
    monkeypatch.setattr(Sleep, "set", lambda self, _, start: kept.update({start: self}))
    monkeypatch.setattr(swap, "wake_up", lambda _, start: kept.pop(start, None))
    return kept


def change(replicas: Any, method: str) -> SleepReply:
    swapper = Swapper(replicas, "app", ServeConfig(model="nowhere"), "start")
    reply: SleepReply = asyncio.run(getattr(swapper, method)())
    return reply


def test_sleep_is_remembered_until_the_service_is_woken(remembered: dict[str, Sleep]) -> None:
    for method, kept in (("sleep", {"start": SLEEP}), ("wake", {})):
        for _ in range(2):
            assert change(Replicas(), method).asleep == (method == "sleep")
            assert remembered == kept


@pytest.mark.parametrize(
    ("answers", "type_"),
    [
        ([state("sleep"), state("wake", "the engine failed")], "model_refused"),
        ([state("sleep"), TimeoutError()], "unavailable"),
        ([RayActorError()], "unavailable"),  # of the broadcast
    ],
)
def test_what_fails_is_undone(remembered: dict[str, Sleep], answers: list[Any], type_: str) -> None:
    for method, undo in (("sleep", "wake"), ("wake", "sleep")):
        before = dict(remembered)
        replicas = Replicas(**{method: answers})
        with pytest.raises(RewardServiceError) as failed:
            change(replicas, method)
        assert (failed.value.type, failed.value.retryable) == (type_, type_ == "unavailable")
        assert (replicas.asked, remembered) == ([method, undo], before)
        change(Replicas(), "sleep")


def test_a_replica_that_died_is_not_waited_for() -> None:
    replicas = Replicas(sleep=[state("sleep"), RayActorError()])
    assert len(change(replicas, "sleep").replicas) == 1
    assert change(Replicas(sleep=[]), "sleep").asleep, "a service at zero sleeps, too"


def test_a_model_that_has_a_functions_name_is_refused(export_dir: Path) -> None:
    config = ServeConfig.model_validate({"model": "nowhere", "registry": str(export_dir.parent)})
    both = Readout(["helpful", "brevity"], [0.0, 0.0], [1.0, 1.0])
    info: Any = SimpleNamespace(model_version="v")
    candidate = Description("a", 1, "candidate", "", "", 1, {}, both, info)
    replicas: Any = Replicas(prepare=[candidate])
    functions = Functions({"brevity": print}, {})
    swapper = Swapper(replicas, "app", config, functions=functions)
    with pytest.raises(RewardServiceError, match="both have a reward named 'brevity'") as refused:
        asyncio.run(swapper.swap(export_dir.name))
    assert refused.value.type == "model_refused"
    assert replicas.asked == ["prepare", "discard_candidate"]
