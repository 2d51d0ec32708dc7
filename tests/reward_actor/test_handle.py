"""Ray handles with the client's methods: from a driver, from a sync and from an async actor."""

from __future__ import annotations

import asyncio
import copy
import json
import os
import pickle
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import cloudpickle
import httpx
import pytest
import ray
from processes import titled
from ray import serve
from ray.serve import RunTarget

from reward_actor import (
    AsyncRewardHandle,
    Group,
    RewardClient,
    RewardHandle,
    RewardScorer,
    RewardServiceError,
    Whole,
)
from reward_actor.client import handle as handles

if TYPE_CHECKING:
    from nursery import Nursery

GROUPS: list[Group | Whole] = [
    Group("Name two fruits.", ["An apple and a pear.", "A hammer."]),
    Group(prompt_ids=[5, 6], completion_ids=[[7], [8, 9]]),
    Whole(["An apple."]),
]
# What a process has that `rayward serve` did not start: the fast path, and no router of its own.
FAST = {"RAY_SERVE_THROUGHPUT_OPTIMIZED": "1", "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0"}


@pytest.fixture(scope="module")
def rewards(export_dir: Path) -> list[float]:
    scorer = RewardScorer.from_pretrained(export_dir, "cpu")
    sequences = [ids for group in GROUPS for ids in scorer.renderer.sequences(group)]
    return [float(r) for r in scorer.score_ids([ids for ids in sequences if isinstance(ids, list)])]


def flat(scores: Any) -> list[float | None]:
    return [reward for group in scores for reward in group.rewards]


def test_a_driver_scores(service: str, rewards: list[float]) -> None:
    handle = RewardHandle()
    assert flat(handle.score_groups(GROUPS)) == pytest.approx(rewards, abs=1e-5)
    scores = handle.token_rewards("Name two fruits.", ["An apple and a pear."])
    assert flat([scores]) == pytest.approx(rewards[:1], abs=1e-5)
    assert scores.token_rewards is not None
    assert scores.tokens is not None
    assert [len(row or []) for row in scores.tokens] == scores.num_tokens
    assert handle.info().num_replicas == 2
    [cut] = handle.score_groups([Whole(ids=[[5, 6, 7], [5, 6]], max_tokens=2, keep="left")])
    assert cut.truncated == [True, False]
    assert cut.rewards[0] == pytest.approx(cut.rewards[1], abs=1e-5)
    with pytest.raises(RewardServiceError) as refused:
        handle.score("Hi.", ["x"] * 501)
    assert refused.value.type == "too_many_tokens"
    assert "Traceback" not in str(refused.value)


@pytest.mark.parametrize(
    "copied",
    [
        lambda value: pickle.loads(pickle.dumps(value)),
        lambda value: pickle.loads(cloudpickle.dumps(value)),
        copy.deepcopy,
    ],
)
def test_a_copy_of_a_handle_finds_the_service_by_itself(
    service: str, rewards: list[float], copied: Any
) -> None:
    handle, awaited = RewardHandle(timeout_s=50.0), AsyncRewardHandle("rayward")
    handle.score_groups(GROUPS)
    assert "_handle" not in handle.__getstate__()
    for one in (copied(handle), copied(copied(handle))):
        assert flat(one.score_groups(GROUPS)) == pytest.approx(rewards, abs=1e-5)
        assert one.__getstate__() == {"_app_name": "rayward", "_timeout_s": 50.0}
    got = asyncio.run(copied(awaited).score_groups(GROUPS))
    assert flat(got) == pytest.approx(rewards, abs=1e-5)


def test_clients_and_handles_are_arguments_of_a_ray_task(
    service: str, rewards: list[float]
) -> None:
    groups = GROUPS

    def scores(*scorers: Any) -> list[Any]:
        return [scorer.score_groups(groups) for scorer in scorers]

    task: Any = ray.remote(num_cpus=0.1)(scores)
    with RewardClient(service) as client:
        client.info()
        for got in ray.get(task.remote(client, RewardHandle()), timeout=120):
            assert flat(got) == pytest.approx(rewards, abs=1e-5)


DRIVER = """
import json, os
import ray
from reward_actor import Group, RewardHandle
ray.init(os.environ["ADDRESS"], log_to_driver=False)
handle = RewardHandle()
print(json.dumps(handle.score("Name two fruits.", ["An apple and a pear.", "A hammer."]).rewards))
"""


@pytest.mark.parametrize("router", [None, "0"])
def test_a_driver_on_the_fast_path_scores(
    nursery: Nursery, service: str, rewards: list[float], router: str | None
) -> None:
    environment = {**os.environ, **FAST, "RAY_AUTH_MODE": "token"}
    environment["ADDRESS"] = ray.get_runtime_context().gcs_address
    del environment["RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP"]
    if router is not None:
        environment["RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP"] = router
    command = [nursery.python, "-c", DRIVER]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout.splitlines()[-1])
    assert got == pytest.approx(rewards[:2], abs=1e-5)


def actor_classes() -> list[Any]:
    """A sync one and an async one, made here so that they travel to workers by value."""
    groups = GROUPS

    class Blocking:
        def __init__(self) -> None:
            self._handle = RewardHandle()

        def scores(self) -> Any:
            return self._handle.score_groups(groups)

    class Awaiting:
        def __init__(self) -> None:
            self._handle = AsyncRewardHandle()

        async def scores(self) -> Any:
            calls = [self._handle.score_groups(groups) for _ in range(20)]
            first, *others = await asyncio.gather(*calls)
            assert all(len(other) == len(first) for other in others)
            tokens = await self._handle.token_rewards("Hi.", ["Hello!"])
            assert tokens.token_rewards is not None
            return first

    return [Blocking, Awaiting]


@pytest.mark.parametrize("environment", [{}, FAST], ids=["as served", "fast path"])
def test_actors_of_both_kinds_score(
    service: str, rewards: list[float], environment: dict[str, str]
) -> None:
    options = {"num_cpus": 0.1, "runtime_env": {"env_vars": environment}}
    actors = [ray.remote(**options)(kind).remote() for kind in actor_classes()]
    for actor in actors:
        scores = ray.get(actor.scores.remote(), timeout=120)
        assert flat(scores) == pytest.approx(rewards, abs=1e-5)
        ray.kill(actor)


def test_a_call_that_takes_too_long_ends_in_time(service: str) -> None:
    async def awaited() -> None:
        await AsyncRewardHandle(timeout_s=0.1).score("Hi.", ["Yes?"])

    replicas = titled("ray::ServeReplica:rayward:RewardModel")
    assert replicas
    for replica in replicas:
        replica.suspend()
    try:
        with pytest.raises(RewardServiceError) as late:
            RewardHandle(timeout_s=0.1).score("Hi.", ["Yes?"])
        assert late.value.type == "deadline_exceeded"
        with pytest.raises(RewardServiceError) as late:
            asyncio.run(awaited())
        assert late.value.type == "deadline_exceeded"
    finally:
        for replica in replicas:
            replica.resume()
    assert RewardHandle().score("Hi.", ["Yes?"]).errors == [None]


def test_a_cancelled_call_leaves_the_handle_usable(service: str, rewards: list[float]) -> None:
    async def calls() -> Any:
        handle = AsyncRewardHandle()
        long = [Group(prompt_ids=[5] * 100, completion_ids=[[n] * 100]) for n in range(6, 300)]
        task = asyncio.create_task(handle.score_groups(long))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return await handle.score_groups(GROUPS)

    assert flat(asyncio.run(calls())) == pytest.approx(rewards, abs=1e-5)


def test_a_killed_ingress_costs_no_call(service: str, rewards: list[float]) -> None:
    handle = RewardHandle()
    [ingress] = titled("ray::ServeReplica:rayward:Ingress")
    with ThreadPoolExecutor(4) as threads:
        calls = [threads.submit(handle.score_groups, GROUPS) for _ in range(40)]
        calls[0].result()
        ingress.kill()
        calls += [threads.submit(handle.score_groups, GROUPS) for _ in range(40)]
        for call in calls:
            assert flat(call.result()) == pytest.approx(rewards, abs=1e-5)
    deadline = time.monotonic() + 60
    while not is_ready(service):
        assert time.monotonic() < deadline
        time.sleep(0.2)


def status(*names: str, of: str = "RUNNING") -> Any:
    """What Ray Serve says of a cluster with these reward services, and one of another kind."""
    ours = SimpleNamespace(deployments={"Ingress": None, "RewardModel": None}, status=of)
    other = SimpleNamespace(deployments={"Ingress": None, "LLM": None}, status=of)
    return SimpleNamespace(applications={"other": other, **dict.fromkeys(names, ours)})


def test_the_one_reward_service_is_found_by_any_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of `serve run serve.app:app` it is "default"; what Ray tells of several that run is looked at
    by tests/system/test_start.py."""
    monkeypatch.setattr(handles.serve, "status", lambda: status("default"))
    assert handles._only_app() == "default"
    monkeypatch.setattr(handles.serve, "status", lambda: status("b", "a"))
    with pytest.raises(ValueError, match="has 2 reward services; name one of a, b"):
        handles._only_app()
    monkeypatch.setattr(handles.serve, "status", lambda: status("a", "rayward"))
    assert handles._only_app() == "rayward"
    monkeypatch.setattr(handles.serve, "status", lambda: status("a", of="DEPLOY_FAILED"))
    with pytest.raises(ValueError, match=r"no reward service runs .* `rayward serve MODEL --ray"):
        handles._only_app()


def test_a_call_tells_which_replica_it_waits_for(
    service: str,
    serve_config: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from serve.app import build, resolve

    monkeypatch.setattr(handles, "_TELL_AFTER_S", 0.3)
    too_large = serve_config.model_copy(update={"cpus_per_replica": 10_000.0})
    target = RunTarget(build(resolve(too_large), use_gpu=False), "stuck", "/stuck")
    serve.run_many([target], wait_for_applications_running=False)
    try:
        with pytest.raises(RewardServiceError):
            RewardHandle("stuck", timeout_s=2).info()

        async def awaited() -> None:
            await AsyncRewardHandle("stuck", timeout_s=2).info()

        with pytest.raises(RewardServiceError):
            asyncio.run(awaited())
    finally:
        serve.delete("stuck", _blocking=False)  # its ingress takes twenty seconds to end
    told = [text for text in caplog.messages if text.startswith("application 'stuck' has no")]
    assert len(told) == 2
    for text in told:
        assert "RewardModel; waiting for it until " in text
    caplog.clear()
    assert RewardHandle("rayward").score("Hi.", ["Yes?"]).errors == [None]
    assert not [text for text in caplog.messages if "waiting" in text]


def test_a_service_sleeps_and_wakes_by_its_handles(service: str) -> None:
    handle = RewardHandle()
    before = flat(handle.score_groups(GROUPS))
    state = handle.sleep()
    assert [each.asleep for each in state.replicas] == [True, True]
    try:
        with pytest.raises(
            RewardServiceError, match=r"wake\(\) of a client or a handle"
        ) as refused:
            RewardHandle(timeout_s=0.5).score("Hi.", ["Yes?"])
        assert refused.value.type == "asleep"
        assert handle.info().asleep

        async def again() -> None:
            patient = AsyncRewardHandle()
            assert (await patient.sleep()).asleep
            waiting = asyncio.create_task(patient.score_groups(GROUPS))
            await asyncio.sleep(0.1)
            assert not (await patient.wake()).asleep
            assert flat(await waiting) == before

        asyncio.run(again())
    finally:
        handle.wake()
    assert flat(handle.score_groups(GROUPS)) == before


def is_ready(service: str) -> bool:
    try:
        return httpx.get(service + "/ready", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False
