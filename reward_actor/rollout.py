"""vLLM rollout actors: sample completions and score them where they are made.

A rollout goes to the scorer as token ids when policy and reward model share their tokenizer and
chat template, so that what is scored is what was sampled; as text otherwise.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import ray

from reward_actor import schema
from reward_actor.client import AsyncRewardClient
from reward_actor.cluster import require_resources
from reward_actor.groups import Group, GroupScores, Prompt
from reward_actor.handle import AsyncRewardHandle
from reward_actor.new_contract import contract_for
from reward_actor.render import Renderer, RenderError, tokenizer_fingerprint
from reward_actor.tokenizer import load_tokenizer

# Small enough for a progress bar that moves, large enough to keep vLLM's batch full.
_PROMPTS_PER_CALL = 8

_CPU_BATCH_TOKENS = 8192


@dataclass(frozen=True)
class Sampling:
    """How a policy is sampled; `max_tokens` bounds a completion."""

    num_completions: int = 4
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 256
    seed: int = 0


@dataclass(frozen=True)
class Engine:
    """A vLLM engine: one per actor. `num_gpus` is its tensor parallelism; 0 runs on the CPU."""

    model: str
    num_gpus: int = 0
    max_model_len: int | None = None
    dtype: str = "auto"
    gpu_memory_utilization: float = 0.9
    cpu_threads: int = 0
    cpu_kv_cache_gib: int = 1


@dataclass
class RolloutGroup:
    """The n rollouts of one prompt; index i of every list belongs to completion i.

    `completion_ids[i]` end with the policy's stop token where it sampled one; `log_probs[i]` has
    one value for each of them, of the distribution that was sampled from (after temperature and
    top-p). `scores` is None where no scorer was asked. A prompt that could not be sampled has an
    `error` and empty lists.
    """

    prompt: Prompt
    prompt_ids: list[int]
    completions: list[str]
    completion_ids: list[list[int]]
    log_probs: list[list[float]]
    finish_reasons: list[str]
    scores: GroupScores | None = None
    error: str | None = None


class Scorer(Protocol):
    """What a rollout actor scores with: an HTTP client, a Serve handle, an actor's handle."""

    async def score_groups(self, groups: Sequence[Group]) -> list[GroupScores]: ...

    async def info(self) -> schema.Info: ...


class RolloutActor:
    """One policy in one vLLM engine. Ask `ready` first; then `rollouts`, as often as you like."""

    def __init__(self, engine: Engine, scorer: Any = None) -> None:
        """`scorer`: a service's URL, a Serve application's name, an actor's handle, or None."""
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        self._renderer = _policy_renderer(engine.model)
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
        self._num_requests = 0

    async def ready(self) -> str:
        """How rollouts travel to the scorer: "token ids", "text", or "no scorer"."""
        if self._scorer is None:
            return "no scorer"
        if self._by_ids is None:
            info = await self._scorer.info()
            self._renderer.use_date(info.template_date)
            own = tokenizer_fingerprint(self._renderer.tokenizer, self._renderer.contract)
            self._by_ids = info.tokenizer_fingerprint == own
        return "token ids" if self._by_ids else "text"

    async def rollouts(
        self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int]
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
            scores = await self._scorer.score_groups([_group(r, by_ids) for r in sampled])
            for rollout, score in zip(sampled, scores, strict=True):
                rollout.scores = score
        return list(rollouts)

    async def _sample(self, prompt: Prompt, sampling: Sampling, seed: int) -> RolloutGroup:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        try:
            prompt_ids = self._renderer.prompt_ids(prompt)
        except RenderError as error:
            return RolloutGroup(prompt, [], [], [], [], [], error=str(error))
        room = self._max_length - len(prompt_ids)
        if room < 1:
            too_long = (
                f"the prompt has {len(prompt_ids)} tokens; the policy takes {self._max_length}"
            )
            return RolloutGroup(prompt, prompt_ids, [], [], [], [], error=too_long)
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
        return RolloutGroup(
            prompt=prompt,
            prompt_ids=prompt_ids,
            completions=[output.text for output in completions],
            completion_ids=[list(output.token_ids) for output in completions],
            log_probs=[_log_probs(output) for output in completions],
            finish_reasons=[output.finish_reason for output in completions],
        )


def longest_needed(policy: str, prompts: Sequence[Prompt], sampling: Sampling) -> int:
    """Tokens that the longest prompt and its completion can take, at most what the policy takes.

    An engine of that length spares the memory of a long-context model's full length. Raises
    ValueError for a policy that is not there.
    """
    renderer = _policy_renderer(policy)
    longest = 0
    for prompt in prompts:
        with contextlib.suppress(RenderError):  # becomes this prompt's error when it is sampled
            longest = max(longest, len(renderer.prompt_ids(prompt)))
    return min(longest + sampling.max_tokens, renderer.contract.max_length)


def _policy_renderer(policy: str) -> Renderer:
    from transformers import AutoConfig

    if not (Path(policy) / "config.json").exists():
        raise ValueError(f"{policy} holds no config.json, so no policy to sample from")
    tokenizer = load_tokenizer(Path(policy))
    config = AutoConfig.from_pretrained(policy)
    format_ = "chat" if tokenizer.chat_template else "text"
    return Renderer(tokenizer, contract_for(tokenizer, config, format=format_))


def start_rollout_actors(engine: Engine, num_actors: int, scorer: Any = None) -> list[Any]:
    """Start actors and wait until each has loaded its engine.

    Raises ValueError for a policy that is not there or a cluster that is too small.
    """
    _policy_renderer(engine.model)
    resources = {"CPU": 1.0, "GPU": float(engine.num_gpus)} if engine.num_gpus else {"CPU": 1.0}
    require_resources([resources] * num_actors)
    threads = engine.cpu_threads or max(1, (os.cpu_count() or 1) // num_actors)
    environment = {"VLLM_LOGGING_LEVEL": "ERROR", "TRANSFORMERS_VERBOSITY": "error"}
    if not engine.num_gpus:
        environment |= {
            "VLLM_CPU_KVCACHE_SPACE": str(engine.cpu_kv_cache_gib),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(threads),
        }
    remote: Any = ray.remote(RolloutActor).options(
        num_cpus=1, num_gpus=engine.num_gpus, runtime_env={"env_vars": environment}
    )
    actors = [remote.remote(engine, scorer) for _ in range(num_actors)]
    ray.get([actor.ready.remote() for actor in actors])
    return actors


def sample(
    actors: Sequence[Any], prompts: Sequence[Prompt], sampling: Sampling
) -> Iterator[tuple[int, RolloutGroup]]:
    """(index of the prompt, its rollouts) as they come, every prompt once, spread over the actors.

    Which actor takes a prompt does not change its rollouts: the seed belongs to the prompt.
    """
    chunks = [
        range(start, min(start + _PROMPTS_PER_CALL, len(prompts)))
        for start in range(0, len(prompts), _PROMPTS_PER_CALL)
    ]
    pending = {
        actors[number % len(actors)].rollouts.remote(
            [prompts[i] for i in chunk],
            sampling,
            [sampling.seed + i * sampling.num_completions for i in chunk],
        ): chunk
        for number, chunk in enumerate(chunks)
    }
    while pending:
        [done], _ = ray.wait(list(pending), num_returns=1)
        yield from zip(pending.pop(done), ray.get(done), strict=True)


def _connect_scorer(scorer: Any) -> Scorer | None:
    if scorer is None:
        return None
    if isinstance(scorer, str) and scorer.startswith(("http://", "https://")):
        return AsyncRewardClient(scorer)
    return AsyncRewardHandle(scorer)


def _group(rollout: RolloutGroup, by_ids: bool) -> Group:
    if by_ids:
        return Group(prompt_ids=rollout.prompt_ids, completion_ids=rollout.completion_ids)
    return Group(rollout.prompt, rollout.completions)


def _log_probs(output: Any) -> list[float]:
    return [
        float(at_token[token].logprob)
        for token, at_token in zip(output.token_ids, output.logprobs, strict=True)
    ]
