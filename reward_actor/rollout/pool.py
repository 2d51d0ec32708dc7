"""Rollout actors by the number: every prompt sampled once, whatever becomes of an actor."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Self

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from reward_actor.actor import is_model_directory, start_scorer_actor
from reward_actor.cluster import connect, require_resources
from reward_actor.errors import EngineDied
from reward_actor.rollout.actor import Adapters, RolloutActor, travelling
from reward_actor.rollout.engine import Running
from reward_actor.rollout.policy import Policy, longest_needed
from reward_actor.rollout.records import (
    Environment,
    Question,
    RolloutGroup,
    Sampling,
    VllmSettings,
    asked,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

logger = logging.getLogger(__name__)

MAX_LOSSES = 5
"""As often an actor may be lost under a prompt until the prompt is to blame."""

_TICK_S = 0.5
_ASK_AGAIN_S = 5.0
_CHARACTERS_PER_TOKEN = 4


@dataclass(eq=False)
class _Actor:
    """One life of an actor. running_tokens: an estimate of what its prompts will take."""

    handle: Any
    started: Any
    running_tokens: int = 0
    num_running: int = 0
    is_ready: bool = False
    asked_at: float = field(default_factory=time.monotonic)
    answer: Any = None


class RolloutPool:
    """`num_actors` engines in one placement group, each with the GPUs of `VllmSettings`.

    scorer            a service's URL (asked with this process's $RAYWARD_TOKEN), the name of a
                      Serve application, a reward model's directory, an `AsyncRewardClient`, an
                      actor's handle, or None.
    max_groups        prompts that an actor has at a time.
    hang_timeout_s    an actor that does not answer for so long is killed. One that is lost, for
                      whatever reason, is replaced, and its unfinished prompts are sampled again
                      with their seeds.
    update_timeout_s  likewise for an actor that does not take weights, sleep or wake.

    A process that is in no Ray cluster starts one.

    Raises ValueError for a policy that is not there or cannot be sampled from and for a cluster
    that is too small, and RewardServiceError for a scorer that does not answer. Use it as a context
    manager or call `close()`.
    """

    _actor_class: ClassVar[type[RolloutActor]] = RolloutActor  # of benchmarks: a simulated one

    def __init__(
        self,
        settings: VllmSettings,
        num_actors: int = 1,
        scorer: Any = None,
        *,
        max_groups: int = 64,
        hang_timeout_s: float = 120.0,
        update_timeout_s: float = 1800.0,
    ) -> None:
        Policy.load(settings.model)
        connect(2.0 * num_actors + 2, log_to_driver=False)
        # Actors run in another directory.
        self.settings = replace(settings, model=str(Path(settings.model).absolute()))
        self._num_actors = num_actors
        self.max_groups = max_groups
        self.hang_timeout_s = hang_timeout_s
        self.update_timeout_s = update_timeout_s
        self.policy_version = 0
        self._weights: Any = None  # other ones than the directory's: a path, or tensors in Ray
        self._weights_version = 0
        self._adapters: dict[str, tuple[str, int]] = {}
        self._is_asleep = False
        self._num_lost_in_a_row = 0
        self._lock = threading.RLock()
        self._updating = threading.Lock()
        bundle = {"CPU": 1.0}
        if settings.num_gpus:
            bundle["GPU"] = float(settings.num_gpus)
        require_resources([bundle] * num_actors)
        self._own_scorer: Any = None
        if isinstance(scorer, str) and is_model_directory(scorer):
            scorer = self._own_scorer = start_scorer_actor(scorer, min(settings.num_gpus, 1))
        self._scorer = travelling(scorer)
        self._place: PlacementGroup = placement_group([bundle] * num_actors, strategy="PACK")
        self._actors: list[_Actor] = []
        try:
            ray.get(self._place.ready())
            self._actors = [self._start(bundle) for bundle in range(num_actors)]
            self.travels_as = str(ray.get([actor.started for actor in self._actors])[0])
        except RayTaskError as error:
            self.close()
            raise error.cause from None
        except BaseException:
            self.close()
            raise

    def rollouts(
        self,
        prompts: Iterable[Question],
        sampling: Sampling,
        indices: Iterable[int] | None = None,
        *,
        environment: Environment | None = None,
    ) -> Rollouts:
        """The rollouts of every prompt, as they come. indices: of the prompts, where they are not
        all; seeds go by them. environment: answers the policy, for several turns."""
        numbered = enumerate(prompts) if indices is None else zip(indices, prompts, strict=True)
        return Rollouts(self, numbered, sampling, environment)

    def update_weights(
        self,
        weights: str | Path | Mapping[str, Tensor],
        version: int | None = None,
        running: Running = "finish",
        adapter: str | None = None,
    ) -> int:
        """Sample with other weights from now on, and return their version: the one given, or the
        last one's plus 1. Requests may run meanwhile; see `Running` for what becomes of them.

        weights: a directory that every actor sees, or tensors, by the names that the policy's
        safetensors have. adapter: what they are a LoRA adapter of this name for, in a directory; it
        is sampled where `Sampling.adapter` names it, and what runs finishes on the one before.
        Raises ValueError for other names or shapes; the old weights stay.
        """
        if adapter is not None:
            return self._update_adapter(adapter, weights, version)
        given: Any = (
            str(Path(weights).absolute())
            if isinstance(weights, str | Path)
            else ray.put(dict(weights))
        )
        with self._updating:
            self._tell(self._actors_now(), "check_weights", given)
            with self._lock:
                self._weights = given
                self._weights_version = self.policy_version = self._next(version)
                actors = list(self._actors)  # what starts from now on has the new weights
            if not self._is_asleep:
                self._tell(
                    actors, "update_weights", given, self.policy_version, running, is_final=True
                )
            return self.policy_version

    def _update_adapter(self, name: str, weights: object, version: int | None) -> int:
        if not isinstance(weights, str | Path):
            raise ValueError("an adapter is given as a directory")
        if name not in self._adapters and len(self._adapters) == self.settings.max_adapters:
            raise ValueError(
                f"VllmSettings.max_adapters is {self.settings.max_adapters}; {name!r} is one more"
            )
        directory = str(Path(weights).absolute())
        with self._updating:
            if self._is_asleep:
                raise ValueError("the pool is asleep; wake it first")
            version = self._next(version)
            self._tell(self._actors_now(), "load_adapter", name, directory, version)
            self._adapters[name] = directory, version
            self.policy_version = version
            return version

    def _next(self, version: int | None) -> int:
        return self.policy_version + 1 if version is None else version

    def sleep(self) -> None:
        """Give the engines' memory back, once what runs has finished; prompts wait until `wake`. On
        a GPU weights stay in the host's memory (`VllmSettings.sleeps`); on a CPU they are dropped.
        """
        with self._updating:
            self._is_asleep = True
            self._tell(self._actors_now(), "sleep")

    def wake(self) -> None:
        """Sample again, with the last weights."""
        with self._updating:
            self._is_asleep = False
            self._tell(self._actors_now(), "wake", *self._state[:3], is_final=True)

    def close(self) -> None:
        """End the actors, and whoever iterates over rollouts with an error."""
        with self._lock:
            for actor in self._actors:
                ray.kill(actor.handle)
            self._actors = []
            if self._own_scorer is not None:
                ray.kill(self._own_scorer)
                self._own_scorer = None
            remove_placement_group(self._place)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # ---- actors

    def _start(self, bundle: int) -> _Actor:
        settings = self.settings
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
            runtime_env={"env_vars": environment},
            scheduling_strategy=PlacementGroupSchedulingStrategy(self._place, bundle),
        )
        handle = remote.remote(settings, self._scorer)
        return _Actor(handle, handle.start.remote(*self._state))

    @property
    def _state(self) -> tuple[Any, int, Adapters, bool]:
        """What an actor that starts must be brought to: weights, their version, adapters, and
        whether it sleeps."""
        return self._weights, self._weights_version, self._adapters, self._is_asleep

    def _actors_now(self) -> list[_Actor]:
        with self._lock:
            return list(self._actors)

    def _tell(
        self, actors: list[_Actor], method: str, *arguments: Any, is_final: bool = False
    ) -> None:
        """Call a method of each and wait; a lost one is replaced. Raises what one raised, but for a
        call that is final: one that raises is then in no known state, and is replaced as well."""
        calls = [getattr(actor.handle, method).remote(*arguments) for actor in actors]
        failures = []
        deadline = time.monotonic() + self.update_timeout_s
        for actor, call in zip(actors, calls, strict=True):
            try:
                ray.get(call, timeout=max(0.0, deadline - time.monotonic()))
            except RayError as error:
                cause = _cause(error)
                if cause is None or is_final:
                    self.replace_lost(actor, error)
                else:
                    failures.append(cause)
        if failures:
            raise failures[0]

    def free_actor(self) -> _Actor | None:
        """That with the fewest running tokens of those that can take a prompt, if any can.

        Raises EngineDied if actors end as fast as they start.
        """
        with self._lock:
            if not self._actors:
                raise EngineDied("the pool is closed")
            for actor in list(self._actors):
                self._look_at(actor)
            free = [a for a in self._actors if a.is_ready and a.num_running < self.max_groups]
            return min(free, key=lambda actor: actor.running_tokens, default=None)

    def wait(self, calls: list[Any]) -> list[Any]:
        """Those of the calls that are done; returns early if an actor is."""
        with self._lock:
            starting = [actor.started for actor in self._actors if not actor.is_ready]
        if not calls and not starting:  # others have all the room
            time.sleep(_TICK_S)
            return []
        done, _ = ray.wait([*calls, *starting], num_returns=1, timeout=_TICK_S)
        return [call for call in done if call in calls]

    def _look_at(self, actor: _Actor) -> None:
        """Whether it has started, and whether it still answers."""
        try:
            if not actor.is_ready:
                if not ray.wait([actor.started], timeout=0)[0]:
                    return
                ray.get(actor.started)
                actor.is_ready = True
            now = time.monotonic()
            if self._updating.locked():  # its engine may take long to answer
                actor.asked_at = now
            elif actor.answer is None:
                actor.answer, actor.asked_at = actor.handle.answer.remote(), now
            elif ray.wait([actor.answer], timeout=0)[0]:
                ray.get(actor.answer)
                if now > actor.asked_at + _ASK_AGAIN_S:
                    actor.answer = None
            elif now > actor.asked_at + self.hang_timeout_s:
                raise EngineDied(f"it has not answered for {self.hang_timeout_s:g} s")
        except (RayError, EngineDied) as error:
            self.replace_lost(actor, error)

    def replace_lost(self, actor: _Actor, why: Exception) -> None:
        """Start another in place of an actor that is lost, unless somebody has already."""
        with self._lock:
            if actor not in self._actors:
                return
            self._num_lost_in_a_row += 1
            if self._num_lost_in_a_row > MAX_LOSSES * self._num_actors:
                raise EngineDied(f"rollout actors end before they have sampled: {_said(why)}")
            logger.warning(
                "lost a rollout actor (%s); starting another, which samples its %d prompts again",
                _said(why),
                actor.num_running,
            )
            ray.kill(actor.handle)
            place = self._actors.index(actor)
            self._actors[place] = self._start(place)

    def sampled(self) -> None:
        """An actor has finished a prompt."""
        self._num_lost_in_a_row = 0


@dataclass
class _Prompt:
    index: int
    question: Question
    num_losses: int = 0


class Rollouts:
    """An iterator, for `for` and for `async for`, over the rollouts of prompts as they are done."""

    def __init__(
        self,
        pool: RolloutPool,
        prompts: Iterable[tuple[int, Question]],
        sampling: Sampling,
        environment: Environment | None,
    ) -> None:
        self._pool = pool
        self._prompts = iter(prompts)
        self._sampling = sampling
        self._environment = environment
        self._is_exhausted = False
        self._again: deque[_Prompt] = deque()
        self._calls: dict[Any, tuple[_Prompt, _Actor, int]] = {}
        self._coming: asyncio.Future[RolloutGroup | None] | None = None

    def __iter__(self) -> Iterator[RolloutGroup]:
        return self

    def __next__(self) -> RolloutGroup:
        try:
            while not self._is_exhausted or self._again or self._calls:
                self._fill()
                for call in self._pool.wait(list(self._calls)):
                    if (group := self._finished(call)) is not None:
                        return group
        except BaseException:
            self.close()
            raise
        raise StopIteration

    def __aiter__(self) -> AsyncIterator[RolloutGroup]:
        return self

    async def __anext__(self) -> RolloutGroup:
        if self._coming is None:  # else that of a call that was cancelled
            loop = asyncio.get_running_loop()
            self._coming = loop.run_in_executor(None, next, self, None)
        group = await asyncio.shield(self._coming)
        self._coming = None
        if group is None:
            raise StopAsyncIteration
        return group

    def close(self) -> None:
        """Give up the prompts that are being sampled."""
        while self._calls:
            call, (_, actor, num_tokens) = self._calls.popitem()
            _release(actor, num_tokens)
            with contextlib.suppress(RayError):
                ray.cancel(call)

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # at the end of a process Ray may be gone
            self.close()

    def _fill(self) -> None:
        """Give prompts to actors that have room."""
        while (actor := self._pool.free_actor()) is not None:
            prompt = self._next_prompt()
            if prompt is None:
                break
            seed = self._sampling.seed + prompt.index * self._sampling.num_completions
            num_tokens = _num_tokens(prompt.question, self._sampling)
            actor.running_tokens += num_tokens
            actor.num_running += 1
            call = actor.handle.rollout.remote(
                prompt.index, prompt.question, self._sampling, seed, self._environment
            )
            self._calls[call] = (prompt, actor, num_tokens)

    def _next_prompt(self) -> _Prompt | None:
        if self._again:
            return self._again.popleft()
        following = next(self._prompts, None)
        self._is_exhausted = following is None
        return None if following is None else _Prompt(*following)

    def _finished(self, call: Any) -> RolloutGroup | None:
        """The rollouts of a call that is done; None if its actor is lost."""
        prompt, actor, num_tokens = self._calls.pop(call)
        _release(actor, num_tokens)
        try:
            group: RolloutGroup = ray.get(call)
        except RayError as error:
            cause = _cause(error)
            if cause is not None:
                raise cause from None
            self._pool.replace_lost(actor, error)
            prompt.num_losses += 1
            if prompt.num_losses < MAX_LOSSES:
                self._again.append(prompt)
                return None
            why = f"{MAX_LOSSES} actors were lost while they sampled it: {_said(error)}"
            asking = asked(prompt.question)
            assert asking.prompt is not None
            return RolloutGroup(asking.prompt, error=why, index=prompt.index)
        self._pool.sampled()
        return group


def rollout(
    policy: str | VllmSettings,
    prompts: Sequence[Question],
    scorer: Any = None,
    sampling: Sampling | None = None,
    *,
    num_actors: int = 1,
    environment: Environment | None = None,
) -> list[RolloutGroup]:
    """The scored rollouts of every prompt, in their order: `RolloutPool` in one call, on this
    machine's own Ray cluster if the process is in none.

    policy: a directory, sampled on a GPU where there is one, or an engine's settings. Raises as
    `RolloutPool` does.
    """
    sampling = sampling or Sampling()
    if isinstance(policy, str):
        import torch

        num_gpus = int(torch.cuda.is_available())
        longest = longest_needed(Policy.load(policy), prompts, sampling)
        policy = VllmSettings(policy, num_gpus, max_model_len=longest)
    with RolloutPool(policy, num_actors, scorer) as pool:
        groups = pool.rollouts(prompts, sampling, environment=environment)
        return sorted(groups, key=lambda group: group.index)


def _release(actor: _Actor, num_tokens: int) -> None:
    actor.running_tokens -= num_tokens
    actor.num_running -= 1


def _cause(error: RayError) -> Exception | None:
    """What a call raised; None if its actor is lost."""
    if not isinstance(error, RayTaskError) or isinstance(error, RayActorError):
        return None
    cause: Exception = error.cause
    return None if isinstance(cause, EngineDied) else cause


def _said(error: Exception) -> str:
    lines = str(getattr(error, "cause", None) or error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def _num_tokens(question: Question, sampling: Sampling) -> int:
    """What the prompt and its completions may take, about."""
    prompt = len(str(asked(question).prompt)) // _CHARACTERS_PER_TOKEN
    return prompt + sampling.num_completions * sampling.max_tokens
