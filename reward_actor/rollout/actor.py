"""vLLM rollout actors: sample completions and score them where they are made.

A rollout goes to the scorer as token ids where policy and reward model share their tokenizer and
chat template and the ids are those of its text under them; as text otherwise.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

from reward_actor import schema
from reward_actor.client.handle import AsyncRewardHandle
from reward_actor.client.sync import AsyncRewardClient
from reward_actor.groups import Group, GroupScores
from reward_actor.model.tokenizer import tokenizer_fingerprint
from reward_actor.render import Renderer, RenderError
from reward_actor.rollout.policy import group_to_score, policy_renderer, question_ids
from reward_actor.rollout.records import (
    Question,
    RolloutGroup,
    Sampling,
    VllmSettings,
    asked,
)

logger = logging.getLogger(__name__)

_CPU_BATCH_TOKENS = 8192


class Scorer(Protocol):
    """What a rollout actor scores with: an HTTP client, a Serve handle, an actor's handle."""

    async def score_groups(self, groups: Sequence[Group]) -> list[GroupScores]: ...

    async def info(self) -> schema.Info: ...


class RolloutActor:
    """One policy in one vLLM engine. Ask `ready` first; then `rollouts`, as often as you like."""

    def __init__(self, engine: VllmSettings, scorer: Any = None) -> None:
        """`scorer`: a service's URL, a Serve application's name, an actor's handle, or None."""
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        self._renderer = policy_renderer(engine.model)
        self._max_length = engine.max_model_len or self._renderer.contract.max_length
        arguments: dict[str, Any] = {
            "model": engine.model,
            "dtype": engine.dtype,
            "max_model_len": self._max_length,
            "disable_log_stats": True,
            # vLLM's default is the logits' own distribution, whatever the temperature.
            "logprobs_mode": "processed_logprobs",
        }
        if engine.num_gpus:
            arguments["tensor_parallel_size"] = engine.num_gpus
            arguments["gpu_memory_utilization"] = engine.gpu_memory_utilization
        else:
            arguments["enforce_eager"] = True  # compiling costs more than a CPU run gains
            # vLLM 0.32 rewinds the generator of a seeded request whose prompt is only half read,
            # and PyTorch's CPU generator cannot be rewound: the engine would die.
            arguments["enable_chunked_prefill"] = False
            arguments["max_num_batched_tokens"] = max(_CPU_BATCH_TOKENS, self._max_length)
        self._engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
        self._scorer = _connect_scorer(scorer)
        self._by_ids: bool | None = None
        self._told_of_text = False
        self._scored = self._renderer  # as the scorer renders, once it has said so
        self._num_requests = 0

    async def ready(self) -> str:
        """How rollouts travel to the scorer: "token ids", "text", or "no scorer"."""
        if self._scorer is None:
            return "no scorer"
        if self._by_ids is None:
            info = await self._scorer.info()
            self._renderer.use_date(info.template_date)
            own = tokenizer_fingerprint(self._renderer.tokenizer, self._renderer.contract)
            self._by_ids = info.tokenizer_fingerprint == own and info.rendering is not None
            if self._by_ids and info.rendering is not None:
                as_scored = replace(self._renderer.contract, **vars(info.rendering))
                self._scored = Renderer(self._renderer.tokenizer, as_scored)
        return "token ids" if self._by_ids else "text"

    async def rollouts(
        self, prompts: Sequence[Question], sampling: Sampling, seeds: Sequence[int]
    ) -> list[RolloutGroup]:
        """Sample every prompt and score the completions. Equal seeds give equal rollouts."""
        rollouts = await asyncio.gather(
            *(
                self._sample(prompt, sampling, seed)
                for prompt, seed in zip(prompts, seeds, strict=True)
            )
        )
        if self._scorer is not None:
            by_ids = await self.ready() == "token ids"
            sampled = [rollout for rollout in rollouts if rollout.error is None]
            scores = await self._scorer.score_groups([self._group(r, by_ids) for r in sampled])
            for rollout, score in zip(sampled, scores, strict=True):
                rollout.scores = score
        return list(rollouts)

    def _group(self, rollout: RolloutGroup, by_ids: bool) -> Group:
        if not by_ids:
            return rollout.as_text()
        group = group_to_score(rollout, self._scored)
        if group.prompt_ids is None and not self._told_of_text:
            self._told_of_text = True
            logger.warning(
                "some rollouts travel as text: their token ids are not those of their text under "
                "the chat template, which a reward is computed from"
            )
        return group

    async def _sample(self, question: Question, sampling: Sampling, seed: int) -> RolloutGroup:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        group = asked(question)
        assert group.prompt is not None
        rollout = RolloutGroup(
            group.prompt, [], [], [], [], [], tools=group.tools, template_args=group.template_args
        )
        try:
            rollout.prompt_ids = prompt_ids = question_ids(self._renderer, group)
        except RenderError as error:
            return replace(rollout, error=str(error))
        room = self._max_length - len(prompt_ids)
        if room < 1:
            too_long = (
                f"the prompt has {len(prompt_ids)} tokens; the policy takes {self._max_length}"
            )
            return replace(rollout, error=too_long)
        parameters = SamplingParams(
            n=sampling.num_completions,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=min(sampling.max_tokens, room),
            seed=seed,
            logprobs=0,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        self._num_requests += 1
        request_id = f"rollout-{self._num_requests}"
        final: Any = None
        async for output in self._engine.generate(
            {"prompt_token_ids": prompt_ids}, parameters, request_id
        ):
            final = output
        completions = sorted(final.outputs, key=lambda output: output.index)
        return replace(
            rollout,
            completions=[output.text for output in completions],
            completion_ids=[list(output.token_ids) for output in completions],
            log_probs=[_log_probs(output) for output in completions],
            finish_reasons=[output.finish_reason for output in completions],
        )


def _connect_scorer(scorer: Any) -> Scorer | None:
    if scorer is None:
        return None
    if isinstance(scorer, str) and scorer.startswith(("http://", "https://")):
        return AsyncRewardClient(scorer)
    return AsyncRewardHandle(scorer)


def _log_probs(output: Any) -> list[float]:
    return [
        float(at_token[token].logprob)
        for token, at_token in zip(output.token_ids, output.logprobs, strict=True)
    ]
