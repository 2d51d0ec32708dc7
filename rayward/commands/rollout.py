"""`rayward rollout POLICY PROMPTS OUTPUT`."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rayward.loading import is_url
from rayward.scoring import ScoringProgress, tell_unscored
from reward_actor.command_line import Flag
from reward_actor.terminal import note, phase, put

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from reward_actor.files import Row
    from reward_actor.groups import Group
    from reward_actor.rollout.records import Sampling, VllmSettings
    from reward_actor.rollout.rows import Form
    from reward_actor.rollout.summary import Summary

NAME = "rollout"
HELP = "sample completions with vLLM and score them"
EXTRA = "rollout"

_FORMS = {
    "advantages": "add to each completion its reward's distance from its group's mean, and that "
    "over the standard deviation",
    "best-of": "write the best completion of each prompt only",
    "pairs": "write the best completion of each prompt as chosen and the worst as rejected, for "
    "`rayward train`",
}
_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("policy", metavar="POLICY", help="directory of the policy")
    parser.add_argument(
        "prompts",
        metavar="PROMPTS",
        help=".jsonl, .jsonl.gz or .parquet rows with a prompt, or a Hugging Face data set",
    )
    parser.add_argument(
        "output",
        metavar="OUTPUT",
        help="the rows with their rollouts, as .jsonl, .jsonl.gz or .parquet; an interrupted run "
        "leaves OUTPUT.unfinished, from which the same command resumes",
    )
    parser.add_argument(
        "--scorer",
        metavar="URL|APP|DIR",
        help="URL of a service, name of a Serve application, directory of a reward model, or "
        "nothing: sample only; ./NAME is always a directory [none]",
    )
    parser.add_argument(
        "--prompt-column",
        metavar="NAME",
        default="prompt",
        help="column of PROMPTS that is sampled from [%(default)s]",
    )
    parser.add_argument(
        "--overwrite",
        action=Flag,
        default=False,
        help="replace an OUTPUT that exists, and discard another run's unfinished one [off]",
    )
    for name, help in _FORMS.items():
        parser.add_argument(f"--{name}", action=Flag, default=False, help=f"{help} [off]")
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument(
        "-n", "--num-completions", type=int, metavar="INT", default=4, help="of each prompt [4]"
    )
    for name, type, default, help in (
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
    sampling.add_argument(
        "--stop",
        metavar="TEXT",
        action="append",
        default=[],
        help="a text that ends a completion; may be given several times [none]",
    )
    sampling.add_argument(
        "--sampling",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="another field of vLLM's SamplingParams, such as top_k=50; may be given several times "
        "[none]",
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
    joins = arguments.ray_address or os.environ.get("RAY_ADDRESS")
    if not joins and find_spec("vllm") is None:  # else only the actors would miss it
        raise ModuleNotFoundError(name="vllm")
    form = _form(arguments)
    sampling = _sampling(arguments)
    if not arguments.output.endswith(_SUFFIXES):
        raise ValueError(f"OUTPUT is {arguments.output}; it must end in {', '.join(_SUFFIXES)}")
    rows, prompts = _read_prompts(arguments, form)
    if is_url(arguments.scorer or ""):  # before engines are started for it
        from reward_actor.client.sync import RewardClient

        with RewardClient(arguments.scorer) as client:
            client.check_reachable()
    if sampling.other and find_spec("vllm"):
        from reward_actor.rollout.engine import parameters_of

        parameters_of(sampling, 0, sampling.max_tokens)
    from reward_actor.rollout.rollout_file import RolloutFile, parquet_schema
    from reward_actor.rollout.rows import FORMS, problems_of
    from reward_actor.rollout.summary import Summary

    if arguments.output.endswith(".parquet"):
        # A run must not end with rows that the output cannot hold.
        pairs = zip(prompts, rows, strict=True)
        parquet_schema({"prompt": asked.prompt, **row} for asked, row in pairs)
    settings = _settings(arguments, prompts, sampling)
    run = _identity(arguments, rows, sampling, settings)
    with RolloutFile(arguments.output, run, overwrite=arguments.overwrite) as file:
        summary, problems = Summary(), list[str | None]()
        for row in file.rows():
            summary.add(row)
            problems += problems_of(row, sampling.num_completions)
        if file.done:
            put(f"resuming: {len(file.done)} of {len(prompts)} prompts are done")
        try:
            for row in _sampled(arguments, settings, sampling, rows, prompts, file.done, summary):
                file.add(row)
                problems += problems_of(row, sampling.num_completions)
        except BaseException:
            if file.done:
                note(
                    f"{len(file.done)} of {len(prompts)} prompts are done and in "
                    f"{file.unfinished}; the same command resumes"
                )
            raise
        num_rows = file.finish(FORMS[form].rows if form else lambda row: [row])
    put(f"{num_rows} rows of {len(prompts)} prompts in {arguments.output}")
    for line in summary.text():
        put(line)
    is_unscored = tell_unscored(problems)
    return int(is_unscored or summary.num_unsampled > 0)


def _sampled(
    arguments: argparse.Namespace,
    settings: VllmSettings,
    sampling: Sampling,
    rows: Sequence[Row],
    prompts: Sequence[Group],
    done: Collection[int],
    summary: Summary,
) -> Iterator[Row]:
    """The rows of prompts that are not done yet, as they come."""
    from reward_actor.cluster import connect
    from reward_actor.rollout import RolloutPool
    from reward_actor.rollout.rows import rollout_row

    left = [index for index in range(len(prompts)) if index not in done]
    if not left:
        return
    num_actors = arguments.num_actors
    connect(2.0 * num_actors + 2, address=arguments.ray_address, log_to_driver=False)
    with phase(f"starting {num_actors} vLLM engines with {arguments.policy}"):
        pool = RolloutPool(settings, num_actors, arguments.scorer)
    put(f"engines ready; completions travel as: {pool.travels_as}")
    summary.begin()
    num_as_text = 0
    with pool, ScoringProgress(len(prompts), len(done)).shown() as progress:
        for group in pool.rollouts([prompts[index] for index in left], sampling, left):
            row = rollout_row(group, rows[group.index])
            summary.add(row)
            progress.advance(summary.line())
            num_as_text += group.travels_as == "text"
            yield row
    if num_as_text and pool.travels_as == "token ids":
        put(
            f"{num_as_text} of {len(left)} prompts' completions travelled as text: their token ids "
            "are not those of their text under the chat template, which a reward is computed from"
        )


def _form(arguments: argparse.Namespace) -> Form | None:
    chosen = [name for name in _FORMS if getattr(arguments, name.replace("-", "_"))]
    if len(chosen) > 1:
        raise ValueError(f"--{chosen[0]} and --{chosen[1]} exclude each other")
    if chosen and arguments.scorer is None:
        raise ValueError(f"--{chosen[0]} needs rewards; add --scorer")
    return cast("Form", chosen[0]) if chosen else None


def _sampling(arguments: argparse.Namespace) -> Sampling:
    from reward_actor.rollout.records import Sampling

    other = {}
    for text in arguments.sampling:
        name, is_given, value = text.partition("=")
        if not is_given:
            raise ValueError(f"--sampling {text}: give NAME=VALUE, such as top_k=50")
        try:
            other[name.strip().replace("-", "_")] = json.loads(value)
        except ValueError:
            other[name.strip().replace("-", "_")] = value
    return Sampling(
        num_completions=arguments.num_completions,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        max_tokens=arguments.max_tokens,
        seed=arguments.seed,
        stop=arguments.stop,
        other=other,
    )


def _read_prompts(
    arguments: argparse.Namespace, form: Form | None
) -> tuple[list[Row], list[Group]]:
    from reward_actor.files import read_rows
    from reward_actor.rollout.rows import columns_of, question_in

    column = arguments.prompt_column
    taken = columns_of(form, column)
    rows, prompts = [], []
    for place, row in read_rows(arguments.prompts):
        prompts.append(question_in(row, place, column, taken))
        rows.append(row)
    return rows, prompts


def _settings(
    arguments: argparse.Namespace, prompts: Sequence[Group], sampling: Sampling
) -> VllmSettings:
    from reward_actor.rollout.policy import Policy, longest_needed
    from reward_actor.rollout.records import VllmSettings

    num_gpus = arguments.num_gpus
    if num_gpus is None:
        import torch

        num_gpus = int(torch.cuda.is_available())
    policy = str(Path(arguments.policy).absolute())
    return VllmSettings(
        policy,
        num_gpus=num_gpus,
        max_model_len=arguments.max_model_len
        or longest_needed(Policy.load(policy), prompts, sampling),
        dtype=arguments.dtype,
        gpu_memory_utilization=arguments.gpu_memory_utilization,
        cpu_kv_cache_gib=arguments.cpu_kv_cache_gib,
    )


def _identity(
    arguments: argparse.Namespace,
    rows: Sequence[Row],
    sampling: Sampling,
    settings: VllmSettings,
) -> Mapping[str, Any]:
    """What rollouts depend on, besides the machine and a service's model, which each row names."""
    from reward_actor.actor import is_model_directory
    from reward_actor.files import line_of

    digest = hashlib.sha256()
    for row in rows:
        digest.update(line_of(row))
    scorer = arguments.scorer or ""
    return {
        "policy": settings.model,
        "its files": _stamps(settings.model),
        "prompts": digest.hexdigest(),
        "prompt_column": arguments.prompt_column,
        "scorer": arguments.scorer,
        "the scorer's files": _stamps(scorer) if is_model_directory(scorer) else [],
        "dtype": settings.dtype,
        "max_model_len": settings.max_model_len,
        **asdict(sampling),
    }


def _stamps(directory: str) -> list[tuple[str, int, int]]:
    """They differ when its files do: names, sizes and times."""
    files = sorted(file for file in Path(directory).iterdir() if file.is_file())
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
