"""Rollout actors by the number: started together, and every prompt sampled once."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import ray

from reward_actor.cluster import require_resources
from reward_actor.rollout.actor import RolloutActor
from reward_actor.rollout.policy import policy_renderer
from reward_actor.rollout.records import Question, RolloutGroup, Sampling, VllmSettings

# Small enough for a progress bar that moves, large enough to keep vLLM's batch full.
_PROMPTS_PER_CALL = 8


def start_rollout_actors(engine: VllmSettings, num_actors: int, scorer: Any = None) -> list[Any]:
    """Start actors and wait until each has loaded its engine.

    Raises ValueError for a policy that is not there or a cluster that is too small.
    """
    policy_renderer(engine.model)
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
    actors: Sequence[Any], prompts: Sequence[Question], sampling: Sampling
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
