"""The rollouts of prompts, one after the other: every prompt once, whatever becomes of an actor."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator
from concurrent.futures import Future
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
# As often a prompt may be with others on an actor that is lost; then it is sampled alone, and a
# prompt that kills its engine ends no other.
_LOSSES_IN_COMPANY = 2


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
        prompts: Iterable[tuple[int, Question]],
        sampling: Sampling,
        environment: Environment | None,
    ) -> None:
        """prompts: with their indices."""
        self._supervisor = supervisor
        self._prompts = iter(prompts)
        self._sampling = sampling
        self._environment = None if environment is None else ray.put(environment)
        self._is_exhausted = False
        self._shares_room = False
        self._again: deque[_Prompt] = deque()
        self._calls: dict[Any, tuple[_Prompt, SupervisedActor, int]] = {}
        self._coming: Future[RolloutGroup | None] | None = None

    def __iter__(self) -> Iterator[RolloutGroup]:
        return self

    def __next__(self) -> RolloutGroup:
        try:
            self._share_room()
            while not self._is_exhausted or self._again or self._calls:
                self._supervisor.look()
                self._fill()
                for call in self._supervisor.wait(list(self._calls)):
                    if (group := self._finished(call)) is not None:
                        return group
        except BaseException:
            self.close()
            raise
        self.close()
        raise StopIteration

    def __aiter__(self) -> AsyncIterator[RolloutGroup]:
        return self

    async def __anext__(self) -> RolloutGroup:
        if self._coming is None:  # else that of a call that was cancelled
            self._coming = Future()
            # Not in the loop's executor, which the end of a cancelled loop would wait for.
            threading.Thread(target=self._come, args=(self._coming,), daemon=True).start()
        [done], _ = await asyncio.wait([asyncio.wrap_future(self._coming)])
        self._coming = None
        group: RolloutGroup | None = done.result()
        if group is None:
            raise StopAsyncIteration
        return group

    def _come(self, coming: Future[RolloutGroup | None]) -> None:
        coming.set_running_or_notify_cancel()
        try:
            coming.set_result(next(self, None))
        except BaseException as error:  # raised where it is awaited
            coming.set_exception(error)

    def close(self) -> None:
        """Give up the prompts that are left."""
        self._is_exhausted = True
        self._again.clear()
        while self._calls:
            call, (_, actor, num_tokens) = self._calls.popitem()
            actor.give_back(num_tokens)
            with contextlib.suppress(RayError):
                ray.cancel(call)
        if self._shares_room:
            self._shares_room = False
            with self._supervisor.lock:
                self._supervisor.num_iterators -= 1

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # at the end of a process Ray may be gone
            self.close()

    def _share_room(self) -> None:
        if not self._shares_room and not self._is_exhausted:
            self._shares_room = True
            with self._supervisor.lock:
                self._supervisor.num_iterators += 1

    def _fill(self) -> None:
        """Give prompts to actors that have room."""
        while len(self._calls) < self._supervisor.share():
            is_suspect = bool(self._again) and self._again[0].num_losses >= _LOSSES_IN_COMPANY
            actor = self._supervisor.free_actor(alone=is_suspect)
            prompt = None if actor is None else self._next_prompt()
            if actor is None or prompt is None:
                break
            num_tokens = _num_tokens(prompt.question, self._sampling)
            actor.take(num_tokens, alone=is_suspect)
            call = actor.handle.rollout.remote(
                prompt.index, prompt.question, self._sampling, self._environment
            )
            self._calls[call] = (prompt, actor, num_tokens)

    def _next_prompt(self) -> _Prompt | None:
        if self._again:
            return self._again.popleft()
        following = None if self._is_exhausted else next(self._prompts, None)
        self._is_exhausted = following is None
        return None if following is None else _Prompt(*following)

    def _finished(self, call: Any) -> RolloutGroup | None:
        """The rollouts of a call that is done; None if its actor is lost."""
        if call not in self._calls:  # closed meanwhile, by another thread
            return None
        prompt, actor, num_tokens = self._calls.pop(call)
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
            self._supervisor.blamed(error)
            why = f"{MAX_LOSSES} actors were lost while they sampled it: {said(error)}"
            asking = asked(prompt.question)
            assert asking.prompt is not None
            return RolloutGroup(asking.prompt, error=why, index=prompt.index)
        finally:
            actor.give_back(num_tokens)
        self._supervisor.sampled()
        return group


def _num_tokens(question: Question, sampling: Sampling) -> int:
    """What the prompt and its completions may take, about."""
    prompt = len(str(asked(question).prompt)) // _CHARACTERS_PER_TOKEN
    return prompt + sampling.num_completions * sampling.max_tokens
