"""The rollouts of prompts, one after the other: every prompt once, whatever becomes of an actor."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

from reward_actor.rollout.records import Environment, Question, RolloutGroup, Sampling, asked
from reward_actor.rollout.supervisor import (
    MAX_LOSSES,
    SupervisedActor,
    Supervisor,
    raised_by,
    said,
)

_CHARACTERS_PER_TOKEN = 4


@dataclass
class _Prompt:
    index: int
    question: Question
    num_losses: int = 0


class Rollouts:
    """An iterator, for `for` and for `async for`, over the rollouts of prompts as they are done."""

    def __init__(
        self,
        supervisor: Supervisor,
        max_groups: int,
        prompts: Iterable[tuple[int, Question]],
        sampling: Sampling,
        environment: Environment | None,
    ) -> None:
        """prompts: with their indices. max_groups: prompts that an actor has at a time."""
        self._supervisor = supervisor
        self._max_groups = max_groups
        self._prompts = iter(prompts)
        self._sampling = sampling
        self._environment = environment
        self._is_exhausted = False
        self._again: deque[_Prompt] = deque()
        self._calls: dict[Any, tuple[_Prompt, SupervisedActor, int]] = {}
        self._coming: asyncio.Future[RolloutGroup | None] | None = None

    def __iter__(self) -> Iterator[RolloutGroup]:
        return self

    def __next__(self) -> RolloutGroup:
        try:
            while not self._is_exhausted or self._again or self._calls:
                self._fill()
                for call in self._supervisor.wait(list(self._calls)):
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
            actor.give_back(num_tokens)
            with contextlib.suppress(RayError):
                ray.cancel(call)

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # at the end of a process Ray may be gone
            self.close()

    def _fill(self) -> None:
        """Give prompts to actors that have room."""
        while (actor := self._supervisor.free_actor(self._max_groups)) is not None:
            prompt = self._next_prompt()
            if prompt is None:
                break
            seed = self._sampling.seed + prompt.index * self._sampling.num_completions
            num_tokens = _num_tokens(prompt.question, self._sampling)
            actor.take(num_tokens)
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
        actor.give_back(num_tokens)
        try:
            group: RolloutGroup = ray.get(call)
        except RayError as error:
            cause = raised_by(error)
            if cause is not None:
                raise cause from None
            self._supervisor.replace_lost(actor, error)
            prompt.num_losses += 1
            if prompt.num_losses < MAX_LOSSES:
                self._again.append(prompt)
                return None
            why = f"{MAX_LOSSES} actors were lost while they sampled it: {said(error)}"
            asking = asked(prompt.question)
            assert asking.prompt is not None
            return RolloutGroup(asking.prompt, error=why, index=prompt.index)
        self._supervisor.sampled()
        return group


def _num_tokens(question: Question, sampling: Sampling) -> int:
    """What the prompt and its completions may take, about."""
    prompt = len(str(asked(question).prompt)) // _CHARACTERS_PER_TOKEN
    return prompt + sampling.num_completions * sampling.max_tokens
