"""`rayward rollout POLICY PROMPTS OUTPUT`."""

from __future__ import annotations

import argparse
import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayward.loading import is_url
from rayward.scoring import ScoringProgress, tell_unscored
from reward_actor.terminal import phase, put

if TYPE_CHECKING:
    from reward_actor.rollout.records import RolloutGroup

NAME = "rollout"
HELP = "sample completions with vLLM and score them"
EXTRA = "rollout"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("policy", metavar="POLICY", help="directory of the policy")
    parser.add_argument("prompts", metavar="PROMPTS", help=".jsonl rows of prompt")
    parser.add_argument("output", metavar="OUTPUT", help=".jsonl rows of rollouts")
    parser.add_argument(
        "--scorer",
        metavar="URL|APP|DIR",
        help="URL of a service, name of a Serve application, directory of a reward model, or "
        "nothing: sample only; ./NAME is always a directory [none]",
    )
    sampling = parser.add_argument_group("sampling")
    for name, type, default, help in (
        ("--num-completions", int, 4, "of each prompt"),
        ("--max-tokens", int, 256, "tokens in a completion at most"),
        ("--temperature", float, 1.0, "of the sampling"),
        ("--top-p", float, 1.0, "share of the probability that is sampled from"),
        ("--seed", int, 0, "of the sampling"),
    ):
        sampling.add_argument(
            name,
            type=type,
            metavar=type.__name__.upper(),
            default=default,
            help=f"{help} [{default:g}]",
        )
    engines = parser.add_argument_group("engines")
    engines.add_argument(
        "--num-actors", type=int, metavar="INT", default=1, help="one engine each [%(default)s]"
    )
    engines.add_argument(
        "--num-gpus", type=int, metavar="INT", help="of an actor [1 where there is one, else 0]"
    )
    engines.add_argument(
        "--dtype", metavar="DTYPE", default="auto", help="of the policy [%(default)s]"
    )
    engines.add_argument(
        "--max-model-len",
        type=int,
        metavar="TOKENS",
        help="of prompt and completion together [what they need]",
    )
    engines.add_argument(
        "--gpu-memory-utilization",
        type=float,
        metavar="FLOAT",
        default=0.9,
        help="share of its GPU that an engine takes [%(default)s]",
    )
    engines.add_argument(
        "--cpu-kv-cache-gib",
        type=int,
        metavar="GIB",
        default=1,
        help="of an engine on the CPU, for keys and values [%(default)s]",
    )
    engines.add_argument(
        "--ray-address",
        metavar="ADDRESS",
        help="join this Ray cluster instead of starting one [none]",
    )


def run(arguments: argparse.Namespace) -> int:
    if is_url(arguments.scorer or ""):  # before engines are started for it
        from reward_actor.client.sync import RewardClient

        with RewardClient(arguments.scorer) as client:
            client.check_reachable()
    joins = arguments.ray_address or os.environ.get("RAY_ADDRESS")
    if not joins and find_spec("vllm") is None:  # else only the actors would miss it
        raise ModuleNotFoundError(name="vllm")
    from reward_actor.cluster import connect
    from reward_actor.files import question_of, read_rows, rollout_row, write_rows
    from reward_actor.rollout.policy import longest_needed
    from reward_actor.rollout.pool import sample, start_rollout_actors
    from reward_actor.rollout.records import Sampling, VllmSettings

    prompts = [question_of(row, place) for place, row in read_rows(arguments.prompts)]
    num_gpus = arguments.num_gpus
    if num_gpus is None:
        import torch

        num_gpus = int(torch.cuda.is_available())
    sampling = Sampling(
        arguments.num_completions,
        arguments.temperature,
        arguments.top_p,
        arguments.max_tokens,
        arguments.seed,
    )
    policy = _whole(arguments.policy)
    engine = VllmSettings(
        policy,
        num_gpus=num_gpus,
        max_model_len=arguments.max_model_len or longest_needed(policy, prompts, sampling),
        dtype=arguments.dtype,
        gpu_memory_utilization=arguments.gpu_memory_utilization,
        cpu_kv_cache_gib=arguments.cpu_kv_cache_gib,
    )
    connect(2.0 * arguments.num_actors + 2, address=arguments.ray_address, log_to_driver=False)
    scorer: Any = arguments.scorer
    if scorer and is_directory(scorer):
        from reward_actor.actor import start_scorer_actor

        scorer = start_scorer_actor(_whole(scorer), num_gpus=min(num_gpus, 1))
    with phase(f"starting {arguments.num_actors} vLLM engines with {arguments.policy}"):
        actors = start_rollout_actors(engine, arguments.num_actors, scorer)

    import ray

    put(f"engines ready; completions travel as: {ray.get(actors[0].ready.remote())}")
    rollouts: dict[int, Any] = {}
    try:
        with ScoringProgress(len(prompts)).shown() as progress:
            for index, rollout in sample(actors, prompts, sampling):
                rollouts[index] = rollout
                progress.add(rollout.scores, sum(map(len, rollout.completion_ids)))
    finally:  # what was sampled before a failure is kept
        write_rows(arguments.output, (rollout_row(rollouts[i]) for i in sorted(rollouts)))
    num_completions = sum(len(rollout.completions) for rollout in rollouts.values())
    put(f"{num_completions} completions of {len(prompts)} prompts in {arguments.output}")
    put(progress.summary())
    ray.shutdown()
    num = sampling.num_completions
    return tell_unscored([text for i in sorted(rollouts) for text in problems(rollouts[i], num)])


def problems(rollout: RolloutGroup, num_completions: int) -> list[str | None]:
    """Why its completions have no reward; None for one that has, or where no scorer was asked."""
    if rollout.error is not None:
        return [f"not sampled: {rollout.error}"] * num_completions
    if rollout.scores is None:
        return [None] * len(rollout.completions)
    return [
        None if error is None else f"{error.type}: {error.message}"
        for error in rollout.scores.errors
    ]


def _whole(name: str) -> str:
    """A directory's absolute path, since actors run in another one; any other name as it is."""
    return str(Path(name).absolute()) if Path(name).is_dir() else name


def is_directory(scorer: str) -> bool:
    """Whether it names a directory, not a Serve application. A bare name is that of a folder only
    if a model or a run lies in it: `rayward` is an application where this project's source is."""
    path = Path(scorer)
    expected = ("config.json", "adapter_config.json", "ensemble.json", "export")
    holds_one = any((path / name).exists() for name in expected)
    return path.is_dir() and (path.name != scorer or holds_one)
