"""Keeps a pool's actors: starts them in one placement group, and replaces those that are lost."""

from __future__ import annotations

import logging
import os
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from reward_actor.errors import EngineDied
from reward_actor.rollout.actor import RolloutActor
from reward_actor.rollout.records import VllmSettings

logger = logging.getLogger(__name__)

MAX_LOSSES = 5
"""As often an actor may be lost under a prompt until the prompt is to blame."""

_TICK_S = 0.5
_ASK_AGAIN_S = 5.0
_RAY_CONCURRENCY = 1000  # its default for actors with coroutines


@dataclass
class ActorState:
    """What an actor that starts is brought to. weights: other ones than the directory's, as a path
    or as a reference to tensors in Ray. adapters: name -> directory and version."""

    weights: Any = None
    version: int = 0
    num_updates: int = 0
    adapters: dict[str, tuple[str, int]] = field(default_factory=dict)
    is_asleep: bool = False


@dataclass(eq=False)
class SupervisedActor:
    """One life of an actor. running_tokens: an estimate of what its prompts will take."""

    handle: Any
    started: Any
    running_tokens: int = 0
    num_running: int = 0
    is_alone: bool = False
    is_ready: bool = False
    asked_at: float = field(default_factory=time.monotonic)
    answer: Any = None

    def take(self, num_tokens: int, *, alone: bool) -> None:
        """A prompt. alone: no other until it is given back."""
        self.running_tokens += num_tokens
        self.num_running += 1
        self.is_alone = alone

    def give_back(self, num_tokens: int) -> None:
        self.running_tokens -= num_tokens
        self.num_running -= 1
        self.is_alone = False


def bundle_of(num_gpus: float) -> dict[str, float]:
    """What Ray sets aside for an actor."""
    return {"CPU": 1.0, "GPU": float(num_gpus)} if num_gpus else {"CPU": 1.0}


class Supervisor:
    """`num_actors` actors, one for each bundle of a placement group.

    max_groups        prompts that an actor has at a time.
    hang_timeout_s    an actor that does not answer for so long counts as lost, and
    call_timeout_s    one that does not start for so long, or return from what `tell` calls.
    updating          held while actors are told something: they may then take long to answer.
    num_iterators     that share the actors' room.
    """

    def __init__(
        self,
        actor_class: type[RolloutActor],
        settings: VllmSettings,
        num_actors: int,
        max_groups: int,
        hang_timeout_s: float,
        call_timeout_s: float,
    ) -> None:
        self._actor_class = actor_class
        self._settings = settings
        self._num_actors = num_actors
        self._scorer: Any = None
        self.max_groups = max_groups
        self._hang_timeout_s = hang_timeout_s
        self._call_timeout_s = call_timeout_s
        self.state = ActorState()
        self.updating = threading.Lock()
        self.lock = threading.RLock()
        self.num_iterators = 0
        self._num_failures_in_a_row = 0
        self._actors: list[SupervisedActor] = []
        self._place = placement_group([bundle_of(settings.num_gpus)] * num_actors, strategy="PACK")

    def start(self, scorer: Any) -> str:
        """Start them all, and return what `RolloutActor.start` does.

        Raises what that raises, and EngineDied if an actor ends or takes too long meanwhile.
        """
        self._scorer = scorer
        deadline = time.monotonic() + self._call_timeout_s
        if not self._place.wait(self._call_timeout_s):
            raise EngineDied("the Ray cluster has had no room for the rollout actors")
        with self.lock:
            self._actors = [self._start(bundle) for bundle in range(self._num_actors)]
        calls = [actor.started for actor in self._actors]
        try:
            return str(ray.get(calls, timeout=max(0.0, deadline - time.monotonic()))[0])
        except RayError as error:
            if (cause := raised_by(error)) is not None:
                raise cause from None
            raise EngineDied(f"a rollout actor has not started: {said(error)}") from error

    def close(self) -> None:
        with self.lock:
            for actor in self._actors:
                ray.kill(actor.handle)
            self._actors = []
            remove_placement_group(self._place)

    def actors(self) -> list[SupervisedActor]:
        """Those of this moment."""
        with self.lock:
            return list(self._actors)

    def tell(
        self,
        method: str,
        *arguments: Any,
        actors: list[SupervisedActor] | None = None,
        is_final: bool = False,
    ) -> None:
        """Call a method of each (default: of all) and wait; a lost one is replaced. Raises what one
        raised; after a call that is final, one that raises is in no known state, and is replaced
        as well."""
        actors = self.actors() if actors is None else actors
        calls = [getattr(actor.handle, method).remote(*arguments) for actor in actors]
        failures = []
        deadline = time.monotonic() + self._call_timeout_s
        for actor, call in zip(actors, calls, strict=True):
            try:
                ray.get(call, timeout=max(0.0, deadline - time.monotonic()))
            except RayError as error:
                cause = raised_by(error)
                if cause is None or is_final:
                    self.replace_lost(actor, error)
                else:
                    failures.append(cause)
        if failures:
            raise failures[0]

    def _start(self, bundle: int) -> SupervisedActor:
        settings = self._settings
        threads = settings.cpu_threads or max(1, (os.cpu_count() or 1) // self._num_actors)
        environment = {
            "HF_HUB_OFFLINE": "1",  # a policy is a directory
            "TRANSFORMERS_VERBOSITY": "error",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        }
        if not settings.num_gpus:
            environment |= {
                "VLLM_CPU_KVCACHE_SPACE": str(settings.cpu_kv_cache_gib),
                "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                "OMP_NUM_THREADS": str(threads),
            }
        remote: Any = ray.remote(self._actor_class).options(
            num_cpus=1,
            num_gpus=settings.num_gpus,
            # Besides its prompts, what it is told and asked.
            max_concurrency=max(_RAY_CONCURRENCY, 2 * self.max_groups),
            runtime_env={"env_vars": environment},
            scheduling_strategy=PlacementGroupSchedulingStrategy(self._place, bundle),
        )
        handle = remote.remote(settings, self._scorer)
        state = self.state
        started = handle.start.remote(
            state.weights, state.version, state.num_updates, state.adapters, state.is_asleep
        )
        return SupervisedActor(handle, started)

    def look(self) -> None:
        """See which actors have started, and replace those that are lost.

        Raises EngineDied if actors end as fast as they start.
        """
        with self.lock:
            if not self._actors:
                raise EngineDied("the pool is closed")
            for actor in list(self._actors):
                self._look_at(actor)

    def free_actor(self, *, alone: bool) -> SupervisedActor | None:
        """That with the fewest running tokens of those that have room, if any has. alone: it must
        have no prompt."""
        most = 1 if alone else self.max_groups
        with self.lock:
            free = [
                a for a in self._actors if a.is_ready and a.num_running < most and not a.is_alone
            ]
            return min(free, key=lambda actor: actor.running_tokens, default=None)

    def share(self) -> int:
        """Prompts that each of several iterators may have at a time, so that none waits for
        another's end."""
        return max(1, self.max_groups * self._num_actors // max(1, self.num_iterators))

    def wait(self, calls: list[Any]) -> list[Any]:
        """Those of the calls that are done; returns early if an actor is."""
        with self.lock:
            starting = [actor.started for actor in self._actors if not actor.is_ready]
        if not calls and not starting:  # others have all the room
            time.sleep(_TICK_S)
            return []
        done, _ = ray.wait([*calls, *starting], num_returns=1, timeout=_TICK_S)
        return [call for call in done if call in calls]

    def _look_at(self, actor: SupervisedActor) -> None:
        """Whether it has started, and whether it still answers."""
        try:
            if not actor.is_ready:
                if not ray.wait([actor.started], timeout=0)[0]:
                    if time.monotonic() > actor.asked_at + self._call_timeout_s:
                        raise EngineDied(f"it has not started for {self._call_timeout_s:g} s")
                    return
                ray.get(actor.started)
                actor.is_ready = True
            now = time.monotonic()
            if self.updating.locked():  # its engine may take long to answer
                actor.asked_at = now
            elif actor.answer is None:
                actor.answer, actor.asked_at = actor.handle.answer.remote(), now
            elif ray.wait([actor.answer], timeout=0)[0]:
                ray.get(actor.answer)
                if now > actor.asked_at + _ASK_AGAIN_S:
                    actor.answer = None
            elif now > actor.asked_at + self._hang_timeout_s:
                raise EngineDied(f"it has not answered for {self._hang_timeout_s:g} s")
        except (RayError, EngineDied) as error:
            self.replace_lost(actor, error)

    def replace_lost(self, actor: SupervisedActor, why: Exception) -> None:
        """Start another in place of an actor that is lost, unless one has been started already."""
        with self.lock:
            if actor not in self._actors:
                return
            if not actor.is_alone:  # else its prompt may be to blame
                self._count_failure(why)
            logger.warning(
                "lost a rollout actor (%s); starting another, which samples its %d prompts again",
                said(why),
                actor.num_running,
            )
            ray.kill(actor.handle)
            place = self._actors.index(actor)
            self._actors[place] = self._start(place)

    def sampled(self) -> None:
        """An actor has finished a prompt."""
        self._num_failures_in_a_row = 0

    def blamed(self, why: Exception) -> None:
        """A prompt is given up as one that kills its engine.

        Raises EngineDied if so many are, one after the other, that the engine is to blame.
        """
        self._count_failure(why)

    def _count_failure(self, why: Exception) -> None:
        self._num_failures_in_a_row += 1
        if self._num_failures_in_a_row > MAX_LOSSES * self._num_actors:
            raise EngineDied(f"rollout actors end before they have sampled: {said(why)}")


def raised_by(error: RayError) -> Exception | None:
    """What a call raised; None if its actor is lost."""
    if not isinstance(error, RayTaskError) or isinstance(error, RayActorError):
        return None
    cause: Exception = error.cause
    return None if isinstance(cause, EngineDied) else cause


def said(error: Exception) -> str:
    """Its first line."""
    lines = str(getattr(error, "cause", None) or error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
