"""Rollout actors whose engine sleeps as long as a GPU would take: what is left is our own work.

Rendering prompts, decoding completions, scoring and all that Ray carries are real.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from reward_actor.rollout import RolloutPool, Sampling, VllmSettings
from reward_actor.rollout.actor import RolloutActor
from reward_actor.rollout.engine import PolicyEngine
from reward_actor.rollout.records import Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# A completion has from a quarter of its most tokens to all of them.
_SHORTEST = 4


@dataclass(frozen=True)
class SimulatedSettings(VllmSettings):
    """words: tokens that are sampled. step_s: of a decoding step, whatever is in the batch.
    max_sequences: in a batch; others wait until one of them is done (continuous batching)."""

    words: tuple[int, ...] = ()
    step_s: float = 0.0
    max_sequences: int = 256


class SimulatedEngine(PolicyEngine):
    def __init__(self, settings: SimulatedSettings, tokenizer: PreTrainedTokenizerFast) -> None:
        self._step_s = settings.step_s
        self._words = settings.words
        self._tokenizer = tokenizer
        self._room = asyncio.Semaphore(settings.max_sequences)

    async def sample(
        self, prompt_ids: list[int], sampling: Sampling, seed: int, max_tokens: int
    ) -> list[Turn]:
        sampled = (
            self._turn(prompt_ids, seed + place, max_tokens)
            for place in range(sampling.num_completions)
        )
        return list(await asyncio.gather(*sampled))

    async def _turn(self, prompt_ids: list[int], seed: int, max_tokens: int) -> Turn:
        source = random.Random(seed)
        num_tokens = source.randint(max_tokens // _SHORTEST, max_tokens)
        async with self._room:
            await asyncio.sleep(num_tokens * self._step_s)
        ids = source.choices(self._words, k=num_tokens - 1)
        text = str(self._tokenizer.decode(ids))
        ids.append(self._tokenizer.eos_token_id)
        return Turn(prompt_ids, text, ids, [-1.0] * num_tokens, [0] * num_tokens, "stop", True)

    async def answer(self) -> None:
        pass


class SimulatedActor(RolloutActor):
    async def wake(self, *_: object) -> None:
        assert isinstance(self._settings, SimulatedSettings)
        self._engine = SimulatedEngine(self._settings, self._policy.prompts.tokenizer)
        self._is_awake.set()


class SimulatedPool(RolloutPool):
    """Takes `SimulatedSettings`; its weights cannot be updated, and it cannot sleep."""

    _actor_class = SimulatedActor
