"""A vLLM rollout actor: samples completions and has them scored where they are made.

A rollout goes to the scorer as token ids where policy and reward model share their tokenizer and
chat template and the ids are those of its text under them; as text otherwise.
"""

from __future__ import annotations

import asyncio
import inspect
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, cast

from reward_actor import schema
from reward_actor.client.connection import TOKEN_VARIABLE
from reward_actor.client.handle import AsyncRewardHandle
from reward_actor.client.sync import AsyncRewardClient
from reward_actor.conversation import as_messages
from reward_actor.errors import ErrorType, RewardServiceError
from reward_actor.groups import Group, GroupScores, Message, SampleError, joined
from reward_actor.model.tokenizer import tokenizer_fingerprint
from reward_actor.prompts import RenderError
from reward_actor.render import Renderer
from reward_actor.rollout.engine import PolicyEngine, Running, Weights
from reward_actor.rollout.policy import Policy, check_weights, group_to_score
from reward_actor.rollout.records import (
    Environment,
    Question,
    RolloutGroup,
    Sampling,
    Turn,
    VllmSettings,
    asked,
)

# What the service refuses of one group, and would of it again.
_OF_A_GROUP = ("invalid_request", "body_too_large", "too_many_tokens")
_POLL_S = 0.05

Adapters = Mapping[str, tuple[str, int]]
"""Name of a LoRA adapter -> its directory and version."""


class Scorer(Protocol):
    """What a rollout actor scores with: an HTTP client, a Serve handle, an actor's handle."""

    async def score_groups(
        self, groups: Sequence[Group], token_rewards: bool = False, turn_rewards: bool = False
    ) -> list[GroupScores]: ...

    async def info(self) -> schema.Info: ...


class RolloutActor:
    """One policy in one vLLM engine. Await `start` first; then `rollout`, as often as you like."""

    def __init__(self, settings: VllmSettings, scorer: Any = None) -> None:
        """scorer: an `AsyncRewardClient` or `AsyncRewardHandle`, a Serve application's name, an
        actor's handle, or None."""
        self._settings = settings
        self._target = scorer
        self._scorer: Scorer | None = None
        self._scored: Renderer | None = None  # as the scorer renders; None: it gets text
        self._engine: PolicyEngine | None = None
        self._num_updates = 0
        self._has_started = asyncio.Event()
        self._is_awake = asyncio.Event()
        self._waking = asyncio.Lock()
        self._num_sampling = 0

    async def start(
        self,
        weights: Weights | None = None,
        version: int = 0,
        num_updates: int = 0,
        adapters: Adapters | None = None,
        is_asleep: bool = False,
    ) -> str:
        """Load the policy, and return how rollouts travel to the scorer: "token ids" (those of
        which the ids are not those of their text excepted), "text", or "no scorer". weights: other
        ones than those of its directory, after so many updates.

        Raises ValueError for a policy that cannot be sampled from, and RewardServiceError.
        """
        self._policy = Policy.load(self._settings.model)
        self._max_length = self._settings.max_model_len or self._policy.max_length
        travels_as = await self._learn_rendering()
        if not is_asleep:
            await self.wake(weights, version, num_updates, adapters or {})
        self._has_started.set()
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
        self,
        index: int,
        question: Question,
        sampling: Sampling,
        environment: Environment | None = None,
    ) -> RolloutGroup:
        """Sample a prompt and score its completions. Equal seeds and indices give equal rollouts.

        Raises EngineDied, RewardServiceError, ValueError for a sampling that vLLM refuses or
        messages of an environment that cannot be rendered, and what an environment raises.
        """
        group = asked(question)
        assert group.prompt is not None
        rollout = RolloutGroup(
            group.prompt, tools=group.tools, template_args=group.template_args, index=index
        )
        try:
            if environment is not None and not self._policy.prompts.is_chat:
                raise RenderError("an environment needs a policy with a chat template")
            rollout.prompt_ids = self._policy.prompt_ids(group)
            self._require_room(rollout.prompt_ids, sampling)
        except RenderError as error:
            rollout.error = str(error)
            return rollout
        turns = await self._sample(rollout.prompt_ids, sampling, sampling.seed_of_prompt(index))
        if environment is not None:
            conversing = (
                self._converse(rollout, turn, place, sampling, environment)
                for place, turn in enumerate(turns)
            )
            for of_one, conversation in await asyncio.gather(*conversing):
                rollout.turns.append(of_one)
                rollout.conversations.append(conversation)
            turns = [of_one[-1] for of_one in rollout.turns]
        rollout.end_with(turns)
        if self._scorer is not None:
            await self._score(rollout, self._scorer)
        return rollout

    def _require_room(self, prompt_ids: list[int], sampling: Sampling) -> None:
        least = sampling.other.get("min_tokens", 1)
        if self._room(prompt_ids) < max(1, least):
            completion = f", and a completion has at least {least}" if least > 1 else ""
            raise RenderError(
                f"the prompt has {len(prompt_ids)} tokens; the policy takes "
                f"{self._max_length}{completion}"
            )

    def _room(self, prompt_ids: list[int]) -> int:
        return max(0, self._max_length - len(prompt_ids))

    async def _sample(self, prompt_ids: list[int], sampling: Sampling, seed: int) -> list[Turn]:
        await self._is_awake.wait()
        assert self._engine is not None
        self._num_sampling += 1
        try:
            max_tokens = min(sampling.max_tokens, self._room(prompt_ids))
            return await self._engine.sample(prompt_ids, sampling, seed, max_tokens)
        finally:
            self._num_sampling -= 1

    async def _converse(
        self,
        rollout: RolloutGroup,
        turn: Turn,
        place: int,
        sampling: Sampling,
        environment: Environment,
    ) -> tuple[list[Turn], list[Message]]:
        """The turns of the completion at this place as long as the environment answers and there is
        room, and the conversation that they are of. turn: the first one."""
        group = Group(rollout.prompt, template_args=rollout.template_args, tools=rollout.tools)
        turns = [turn]
        conversation = [*as_messages(rollout.prompt), _said(turn)]
        single = replace(sampling, num_completions=1)
        while len(turns) < sampling.max_turns and turns[-1].finish_reason != "length":
            answer = environment(list(conversation))
            if inspect.isawaitable(answer):
                answer = await answer
            if not answer:
                break
            prompt_ids = self._policy.prompt_ids(replace(group, prompt=[*conversation, *answer]))
            if not self._room(prompt_ids):
                turns[-1] = replace(turns[-1], finish_reason="length")
                break
            seed = sampling.seed_of_prompt(rollout.index, len(turns)) + place
            turns += await self._sample(prompt_ids, single, seed)
            conversation += [*answer, _said(turns[-1])]
        return turns, conversation

    async def _score(self, rollout: RolloutGroup, scorer: Scorer) -> None:
        try:
            if rollout.conversations:
                groups = [
                    Group(
                        said[:-1], [text], template_args=rollout.template_args, tools=rollout.tools
                    )
                    for said, text in zip(rollout.conversations, rollout.completions, strict=True)
                ]
                rollout.travels_as = "text"
                rollout.scores = joined(await scorer.score_groups(groups, turn_rewards=True))
            else:
                [rollout.scores] = await scorer.score_groups([self._group(rollout)])
        except RewardServiceError as error:
            if error.type not in _OF_A_GROUP:
                raise
            rollout.scores = _unscored(len(rollout.completions), error)

    def _group(self, rollout: RolloutGroup) -> Group:
        group = rollout.as_text()
        if self._scored is not None:
            group = group_to_score(rollout, self._scored)
        rollout.travels_as = "text" if group.prompt_ids is None else "token ids"
        return group

    async def answer(self) -> None:
        """Return once the engine core does. Raises EngineDied."""
        if self._is_awake.is_set() and self._engine is not None:
            await self._engine.answer()

    async def check_weights(self, directory: str) -> None:
        """Raise ValueError unless its weights have the names and shapes of this policy's."""
        check_weights(self._settings.model, directory)

    async def update_weights(
        self, weights: Weights, version: int, num_updates: int, running: Running
    ) -> None:
        await self._is_awake.wait()
        assert self._engine is not None
        await self._engine.update_weights(weights, version, running)
        self._num_updates = num_updates

    async def load_adapter(self, name: str, directory: str, version: int) -> None:
        await self._is_awake.wait()
        assert self._engine is not None
        await self._engine.load_adapter(name, directory, version)

    async def sleep(self) -> None:
        """Once what runs has finished, free the GPU's memory; on a CPU, drop the engine."""
        await self._has_started.wait()
        if not self._is_awake.is_set():
            return
        assert self._engine is not None
        self._is_awake.clear()
        while self._num_sampling:
            await asyncio.sleep(_POLL_S)
        if self._settings.num_gpus:
            await self._engine.sleep()
        else:
            self._engine.close()
            self._engine = None

    async def wake(
        self, weights: Weights | None, version: int, num_updates: int, adapters: Adapters
    ) -> None:
        """Sample (again), with these weights where they have been updated since."""
        async with self._waking:  # one that starts may be asked to as well
            if self._is_awake.is_set():
                return
            if self._engine is None:
                self._engine = PolicyEngine(self._settings, self._max_length)
                await self._engine.set_version(0)
                self._num_updates = 0
                for name, (directory, of_adapter) in adapters.items():
                    await self._engine.load_adapter(name, directory, of_adapter)
            else:
                await self._engine.wake()
            if weights is not None and num_updates != self._num_updates:
                await self._engine.update_weights(weights, version, "finish")
                self._num_updates = num_updates
            self._is_awake.set()


def _said(turn: Turn) -> Message:
    return {"role": "assistant", "content": turn.completion}


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


def travelling(target: Any) -> Any:
    """What a scorer is named by, as an actor can be given it: with this process's token."""
    if isinstance(target, str) and target.startswith(("http://", "https://")):
        return AsyncRewardClient(target, token=os.environ.get(TOKEN_VARIABLE))
    return target


def _scorer_at(target: Any) -> Scorer:
    if isinstance(target, AsyncRewardClient | AsyncRewardHandle):
        return target
    return AsyncRewardHandle(target)
