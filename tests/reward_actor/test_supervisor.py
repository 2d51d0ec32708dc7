"""What becomes of prompts and of actors that fail, hang or are shared, with a simulated engine."""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.rollout.simulated import SimulatedActor, SimulatedPool, SimulatedSettings
from reward_actor.errors import EngineDied
from reward_actor.rollout import Sampling, rollouts, supervisor

pytestmark = pytest.mark.process

SAMPLING = Sampling(num_completions=2, max_tokens=8)
FOR_EVER_S = 1e6


@pytest.fixture(scope="module")
def settings(ray_cluster: None, base_model: Path) -> SimulatedSettings:
    return SimulatedSettings(str(base_model), words=(300, 301, 302), step_s=0.002)


@pytest.fixture(scope="module")
def pool(settings: SimulatedSettings) -> Iterator[SimulatedPool]:
    with SimulatedPool(settings, max_groups=8) as started:
        yield started


def poisoned(conversation: list[Any]) -> list[Any]:
    """Ends the actor's process at one of the prompts."""
    if conversation[0]["content"] == "poison":
        os._exit(1)
    return []


def test_a_prompt_that_kills_its_actor_ends_no_other(
    pool: SimulatedPool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Several in a row neither."""
    monkeypatch.setattr(rollouts, "MAX_LOSSES", 3)
    prompts = [f"Prompt {number}" for number in range(12)]
    prompts[2:6] = ["poison"] * 4
    groups = list(pool.rollouts(prompts, SAMPLING, environment=poisoned))
    assert sorted(group.index for group in groups) == list(range(12))
    bad = {group.index: group.error for group in groups if group.error is not None}
    assert sorted(bad) == [2, 3, 4, 5]
    for why in bad.values():
        assert why.startswith("3 actors were lost while they sampled it: ")
    lost = [line for line in caplog.messages if line.startswith("lost a rollout actor")]
    assert len(lost) == 2 + 4  # in company, then each alone
    assert "which samples its 8 prompts again" in lost[0]


def test_an_engine_that_dies_of_every_prompt_ends_the_run(
    pool: SimulatedPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollouts, "MAX_LOSSES", 3)
    monkeypatch.setattr(supervisor, "MAX_LOSSES", 3)
    prompts = ["poison"] * 12
    done = pool.rollouts(prompts, SAMPLING, environment=poisoned)
    with pytest.raises(EngineDied, match="rollout actors end before they have sampled"):
        list(done)
    assert len(list(pool.rollouts(["Prompt"], SAMPLING))) == 1


def test_iterators_share_the_actors(pool: SimulatedPool) -> None:
    """One that never ends leaves room for another."""
    endless = pool.rollouts((f"Prompt {number}" for number in itertools.count()), SAMPLING)
    next(endless)
    few = pool.rollouts(["a", "b", "c"], SAMPLING)
    found = []
    for group in endless:
        assert group.error is None
        found += list(itertools.islice(few, 1))
        if len(found) == 3:
            break
    assert sorted(group.index for group in found) == [0, 1, 2]
    endless.close()
    assert list(endless) == list(few) == []
    assert pool.supervisor.num_iterators == 0
    assert [actor.num_running for actor in pool.supervisor.actors()] == [0]


def test_an_iterator_that_has_failed_is_at_its_end(pool: SimulatedPool) -> None:
    def failing(conversation: list[Any]) -> list[Any]:
        raise LookupError(f"no answer to {conversation[0]['content']}")

    found = pool.rollouts((f"Prompt {number}" for number in range(50)), SAMPLING,
                          environment=failing)  # fmt: skip
    with pytest.raises(LookupError, match="no answer to Prompt"):
        next(found)
    assert list(found) == []


def test_a_cancelled_loop_ends(settings: SimulatedSettings, pool: SimulatedPool) -> None:
    """Its thread waits for a rollout that does not come."""

    async def hanging(conversation: list[Any]) -> list[Any]:
        await asyncio.sleep(FOR_EVER_S)
        return []

    found = pool.rollouts(["Hi."], SAMPLING, environment=hanging)
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        asyncio.run(asyncio.wait_for(anext(found), 0.3))
    assert time.monotonic() - began < 5
    found.close()


class StuckActor(SimulatedActor):
    async def start(self, *_: object) -> str:
        await asyncio.sleep(FOR_EVER_S)
        raise AssertionError


class StuckPool(SimulatedPool):
    _actor_class = StuckActor


def test_actors_that_do_not_start_are_not_waited_for(settings: SimulatedSettings) -> None:
    with pytest.raises(EngineDied, match="a rollout actor has not started"):
        StuckPool(settings, update_timeout_s=5)
