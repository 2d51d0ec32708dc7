"""A vLLM rollout actor: samples completions and has them scored where they are made.

A rollout goes to the scorer as token ids where policy and reward model share their tokenizer and
chat template and the ids are those of its text under them; as text otherwise.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any, Protocol, cast

from reward_actor import schema
from reward_actor.client.handle import AsyncRewardHandle
from reward_actor.client.sync import AsyncRewardClient
from reward_actor.errors import ErrorType, RewardServiceError
from reward_actor.groups import Group, GroupScores, SampleError
from reward_actor.model.tokenizer import tokenizer_fingerprint
from reward_actor.prompts import RenderError
from reward_actor.render import Renderer
from reward_actor.rollout.engine import PolicyEngine, Running, Weights
from reward_actor.rollout.policy import Policy, check_weights, group_to_score
from reward_actor.rollout.records import Question, RolloutGroup, Sampling, VllmSettings, asked

logger = logging.getLogger(__name__)

# What the service refuses of one group, and would of it again.
_OF_A_GROUP = ("invalid_request", "body_too_large", "too_many_tokens")
_POLL_S = 0.05


class Scorer(Protocol):
    """What a rollout actor scores with: an HTTP client, a Serve handle, an actor's handle."""

    async def score_groups(self, groups: Sequence[Group]) -> list[GroupScores]: ...

    async def info(self) -> schema.Info: ...


class RolloutActor:
    """One policy in one vLLM engine. Await `start` first; then `rollout`, as often as you like."""

    def __init__(self, settings: VllmSettings, scorer: Any = None) -> None:
        """`scorer`: a service's URL, a Serve application's name, an actor's handle, or None."""
        self._settings = settings
        self._target = scorer
        self._scorer: Scorer | None = None
        self._scored: Renderer | None = None  # as the scorer renders; None: it gets text
        self._told_of_text = False
        self._engine: PolicyEngine | None = None
        self._version = 0
        self._is_awake = asyncio.Event()
        self._num_sampling = 0

    async def start(self, weights: Weights | None = None, version: int = 0) -> str:
        """Load the policy, and return how rollouts travel to the scorer: "token ids", "text", or
        "no scorer". weights: other ones than those of its directory.

        Raises ValueError for a policy that cannot be sampled from, and RewardServiceError.
        """
        self._policy = Policy.load(self._settings.model)
        self._max_length = self._settings.max_model_len or self._policy.max_length
        travels_as = await self._learn_rendering()
        await self.wake(weights, version)
        return travels_as

    async def _learn_rendering(self) -> str:
        if self._target is None:
            return "no scorer"
        self._scorer = _scorer_at(self._target)
        info = await self._scorer.info()
        self._policy.prompts.use_date(info.template_date)
        own = tokenizer_fingerprint(self._policy.prompts.tokenizer, self._policy.prompts.format)
        if info.tokenizer_fingerprint != own or info.rendering is None:
            return "text"
        try:
            self._scored = self._policy.as_scored(info.rendering)
        except ValueError:
            return "text"
        return "token ids"

    async def rollout(
        self, index: int, question: Question, sampling: Sampling, seed: int
    ) -> RolloutGroup:
        """Sample a prompt and score its completions. Equal seeds give equal rollouts.

        Raises EngineDied, RewardServiceError, and ValueError for a sampling that vLLM refuses.
        """
        group = asked(question)
        assert group.prompt is not None
        rollout = RolloutGroup(
            index, group.prompt, tools=group.tools, template_args=group.template_args
        )
        try:
            rollout.prompt_ids = prompt_ids = self._policy.prompt_ids(group)
        except RenderError as error:
            rollout.error = str(error)
            return rollout
        room = self._max_length - len(prompt_ids)
        if room < 1:
            rollout.error = (
                f"the prompt has {len(prompt_ids)} tokens; the policy takes {self._max_length}"
            )
            return rollout
        await self._is_awake.wait()
        assert self._engine is not None
        self._num_sampling += 1
        try:
            sampled = await self._engine.sample(
                prompt_ids, sampling, seed, min(sampling.max_tokens, room)
            )
        finally:
            self._num_sampling -= 1
        vars(rollout).update(vars(sampled))
        if self._scorer is not None:
            await self._score(rollout, self._scorer)
        return rollout

    async def _score(self, rollout: RolloutGroup, scorer: Scorer) -> None:
        try:
            [rollout.scores] = await scorer.score_groups([self._group(rollout)])
        except RewardServiceError as error:
            if error.type not in _OF_A_GROUP:
                raise
            rollout.scores = _unscored(len(rollout.completions), error)

    def _group(self, rollout: RolloutGroup) -> Group:
        if self._scored is None:
            return rollout.as_text()
        group = group_to_score(rollout, self._scored)
        if group.prompt_ids is None and not self._told_of_text:
            self._told_of_text = True
            logger.warning(
                "some rollouts travel as text: their token ids are not those of their text under "
                "the chat template, which a reward is computed from"
            )
        return group

    async def answer(self) -> None:
        """Return once the engine core does. Raises EngineDied."""
        if self._is_awake.is_set() and self._engine is not None:
            await self._engine.answer()

    async def check_weights(self, weights: Weights) -> None:
        """Raise ValueError unless they have the names and shapes of this policy's."""
        check_weights(self._settings.model, weights)

    async def update_weights(self, weights: Weights, version: int, running: Running) -> None:
        await self._is_awake.wait()
        assert self._engine is not None
        await self._engine.update_weights(weights, version, running)
        self._version = version

    async def sleep(self) -> None:
        """Once what runs has finished, free the GPU's memory; on a CPU, drop the engine."""
        await self._is_awake.wait()
        assert self._engine is not None
        self._is_awake.clear()
        while self._num_sampling:
            await asyncio.sleep(_POLL_S)
        if self._settings.num_gpus:
            await self._engine.sleep()
        else:
            self._engine.close()
            self._engine = None

    async def wake(self, weights: Weights | None, version: int) -> None:
        """Sample (again), with these weights where they are others than before."""
        if self._engine is None:
            self._engine = PolicyEngine(self._settings, self._max_length)
            await self._engine.set_version(0)
            self._version = 0
        else:
            await self._engine.wake()
        if weights is not None and version != self._version:
            await self._engine.update_weights(weights, version, "finish")
            self._version = version
        self._is_awake.set()


def _unscored(num_completions: int, error: RewardServiceError) -> GroupScores:
    why = SampleError(cast("ErrorType", error.type), error.message)
    return GroupScores(
        rewards=[None] * num_completions,
        raw_scores=[None] * num_completions,
        num_tokens=[0] * num_completions,
        truncated=[False] * num_completions,
        errors=[why] * num_completions,
        model_version="",
    )


def _scorer_at(target: Any) -> Scorer:
    if isinstance(target, str) and target.startswith(("http://", "https://")):
        return AsyncRewardClient(target)
    return AsyncRewardHandle(target)
