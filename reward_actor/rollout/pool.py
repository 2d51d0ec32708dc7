"""A policy in several vLLM engines, its completions scored; `rollout` is all of it in one call."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Self

import ray

from reward_actor.actor import is_model_directory, start_scorer_actor
from reward_actor.cluster import connect, require_resources
from reward_actor.rollout.actor import RolloutActor, travelling
from reward_actor.rollout.engine import Running
from reward_actor.rollout.policy import Policy, as_safetensors, longest_needed
from reward_actor.rollout.records import (
    Environment,
    Question,
    RolloutGroup,
    Sampling,
    VllmSettings,
)
from reward_actor.rollout.rollouts import Rollouts
from reward_actor.rollout.supervisor import Supervisor, bundle_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


class RolloutPool:
    """`num_actors` engines in one placement group, each with the GPUs of `VllmSettings`.

    scorer            a service's URL (asked with this process's $RAYWARD_TOKEN), the name of a
                      Serve application, a reward model's directory, an `AsyncRewardClient`, an
                      actor's handle, or None.
    max_groups        prompts that an actor has at a time.
    hang_timeout_s    an actor that does not answer for so long is killed. One that is lost, for
                      whatever reason, is replaced, and its unfinished prompts are sampled again
                      with their seeds.
    update_timeout_s  likewise for an actor that does not start, take weights, sleep or wake.

    A process that is in no Ray cluster starts one.

    Raises ValueError for a policy that is not there or cannot be sampled from and for a cluster
    that is too small, RewardServiceError for a scorer that does not answer, and EngineDied for
    actors that do not start. Use it as a context manager or call `close()`.
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
        self.policy_version = 0
        own = isinstance(scorer, str) and is_model_directory(scorer)
        scorer_gpus = min(settings.num_gpus, 1)
        bundles = [bundle_of(settings.num_gpus)] * num_actors
        require_resources([*bundles, bundle_of(scorer_gpus)] if own else bundles)
        self._own_scorer: Any = start_scorer_actor(scorer, scorer_gpus) if own else None
        self.supervisor = Supervisor(
            self._actor_class,
            self.settings,
            num_actors,
            max_groups,
            hang_timeout_s,
            update_timeout_s,
        )
        self._state = self.supervisor.state
        try:
            self.travels_as = self.supervisor.start(travelling(self._own_scorer or scorer))
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
        return Rollouts(self.supervisor, numbered, sampling, environment)

    def update_weights(
        self,
        weights: str | Path | Mapping[str, Tensor],
        version: int | None = None,
        running: Running = "finish",
        adapter: str | None = None,
    ) -> int:
        """Sample with other weights from now on, and return their version: the one given, or the
        last one's plus 1. Requests may run meanwhile; see `Running` for what becomes of them.

        weights: a directory that every actor sees and that stays as it is until the next update (an
        actor that takes a lost one's place reads it), or tensors, by the names that the policy's
        safetensors have. adapter: what they are a LoRA adapter of this name for, in a directory; it
        is sampled where `Sampling.adapter` names it, and what runs finishes on the one before.
        Raises ValueError for other names or shapes; the old weights stay.
        """
        if adapter is not None:
            return self._update_adapter(adapter, weights, version)
        with self.supervisor.updating:
            if isinstance(weights, str | Path):
                given: Any = str(Path(weights).absolute())
                self.supervisor.tell("check_weights", given)
            else:
                given = ray.put(as_safetensors(self.settings.model, weights))
            with self.supervisor.lock:
                self._state.weights = given
                self._state.num_updates += 1
                self._state.version = self.policy_version = self._next(version)
                actors = self.supervisor.actors()  # what starts from now on has the new weights
            if not self._state.is_asleep:
                self.supervisor.tell(
                    "update_weights",
                    given,
                    self.policy_version,
                    self._state.num_updates,
                    running,
                    actors=actors,
                    is_final=True,
                )
            return self.policy_version

    def _update_adapter(self, name: str, weights: object, version: int | None) -> int:
        if not isinstance(weights, str | Path):
            raise ValueError("an adapter is given as a directory")
        adapters = self._state.adapters
        if name not in adapters and len(adapters) == self.settings.max_adapters:
            raise ValueError(
                f"VllmSettings.max_adapters is {self.settings.max_adapters}; {name!r} is one more"
            )
        directory = str(Path(weights).absolute())
        with self.supervisor.updating:
            if self._state.is_asleep:
                raise ValueError("the pool is asleep; wake it first")
            version = self._next(version)
            with self.supervisor.lock:
                self._state.adapters = {**adapters, name: (directory, version)}
                actors = self.supervisor.actors()  # what starts from now on has the adapter
            try:
                self.supervisor.tell("load_adapter", name, directory, version, actors=actors)
            except BaseException:
                self._state.adapters = adapters
                raise
            self.policy_version = version
            return version

    def _next(self, version: int | None) -> int:
        return self.policy_version + 1 if version is None else version

    def sleep(self) -> None:
        """Give the engines' memory back, once what runs has finished; prompts wait until `wake`. On
        a GPU weights stay in the host's memory; on a CPU they are dropped. A reward model that was
        given as a directory stays awake.

        Raises ValueError on a GPU without `VllmSettings.sleeps`.
        """
        if self.settings.num_gpus and not self.settings.sleeps:
            raise ValueError("these engines cannot sleep; start them with VllmSettings.sleeps")
        with self.supervisor.updating:
            self._state.is_asleep = True
            self.supervisor.tell("sleep")

    def wake(self) -> None:
        """Sample again, with the last weights."""
        state = self._state
        with self.supervisor.updating:
            state.is_asleep = False
            newest = (state.weights, state.version, state.num_updates, state.adapters)
            self.supervisor.tell("wake", *newest, is_final=True)

    def close(self) -> None:
        """End the actors, and what iterates over rollouts with an error."""
        self.supervisor.close()
        if self._own_scorer is not None:
            ray.kill(self._own_scorer)
            self._own_scorer = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


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
        longest = None  # several turns may take all that there is
        if environment is None:
            longest = longest_needed(Policy.load(policy), prompts, sampling)
        policy = VllmSettings(policy, num_gpus, max_model_len=longest)
    with RolloutPool(policy, num_actors, scorer) as pool:
        groups = pool.rollouts(prompts, sampling, environment=environment)
        return sorted(groups, key=lambda group: group.index)
