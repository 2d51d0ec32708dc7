"""What the commands of `rayward` do; `rayward.py` says what they accept.

Every command imports what it needs when it runs, and returns an exit code.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def _loading(arguments: argparse.Namespace) -> dict[str, Any]:
    """What was given of `_add_loading`'s options, as `RewardScorer.from_pretrained` takes it.

    Raises ValueError if the model is a service's.
    """
    given = _given(arguments, ("device", "dtype", "attention", "trust_remote_code"))
    if given and _is_url(arguments.model):
        raise ValueError(
            f"{_options(given)}: these are for loading a model, and the service at "
            f"{arguments.model} has loaded its own; give them to `rayward serve`"
        )
    return given


def _given(arguments: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    return {name: getattr(arguments, name) for name in names if name in arguments}


def _options(names: Iterable[str]) -> str:
    return ", ".join("--" + name.replace("_", "-") for name in names)


def _is_url(model: str) -> bool:
    return model.startswith(("http://", "https://"))


def init_model(arguments: argparse.Namespace) -> int:
    from trainer.init_model import init_model, texts_from_file

    source = arguments.tokenizer_from
    if not (arguments.corpus or source):
        raise ValueError("init-model needs --corpus FILE or --tokenizer-from DIR")
    path = init_model(
        Path(arguments.directory),
        texts_from_file(arguments.corpus) if arguments.corpus else (),
        vocab_size=arguments.vocab_size,
        hidden_size=arguments.hidden_size,
        num_layers=arguments.num_layers,
        max_position_embeddings=arguments.max_length,
        tokenizer_from=Path(source) if source else None,
        seed=arguments.seed,
    )
    print(f"base model: {path}")
    return 0


def evaluate(arguments: argparse.Namespace) -> int:
    from trainer.data_config import Columns

    columns = _given(arguments, Columns.model_fields)
    rules = _given(arguments, ("over_long", "deduplicate"))
    if arguments.rewardbench:
        if columns or rules:
            raise ValueError(
                f"{_options([*columns, *rules])}: RewardBench has columns and rules of its own"
            )
        from trainer.rewardbench import evaluate_rewardbench

        result = evaluate_rewardbench(
            arguments.model, arguments.data, arguments.rewardbench, **_loading(arguments)
        )
    else:
        from trainer.evaluate import evaluate_model

        result = evaluate_model(
            arguments.model,
            arguments.data,
            columns=Columns.model_validate(columns),
            **rules,
            **_loading(arguments),
        )
    if arguments.json:
        print(json.dumps(result))
    else:
        _print_evaluation(result)
    return 0


def _print_evaluation(result: dict[str, Any]) -> None:
    """Single values, then a table for each thing of several; lists of objects are only in JSON."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    def cell(value: Any) -> str:
        if value is None or value == []:
            return "-"
        if isinstance(value, list):
            value = ", ".join(map(str, value))
        return f"{value:.4f}" if isinstance(value, float) else escape(str(value))

    console = Console()
    single = Table(box=None, show_header=False)
    single.add_column(justify="right")
    single.add_column(overflow="fold")
    for name, value in result.items():
        if not isinstance(value, dict) and not _holds_dicts(value):
            single.add_row(name, cell(value))
    console.print(single)
    for name, parts in result.items():
        if not (isinstance(parts, dict) and parts):
            continue
        rows = {k: v if isinstance(v, dict) else {"": v} for k, v in parts.items()}
        columns = list(dict.fromkeys(column for row in rows.values() for column in row))
        table = Table(name, *columns)
        for part, row in rows.items():
            table.add_row(escape(part), *(cell(row[c]) if c in row else "" for c in columns))
        console.print(table)


def _holds_dicts(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(item, dict) for item in value)


def serve(arguments: argparse.Namespace) -> int:
    from reward_actor.settings import validate
    from serve.config import ServeConfig

    prefix = "setting_"
    settings = {
        name.removeprefix(prefix): value
        for name, value in vars(arguments).items()
        if name.startswith(prefix) and value is not None
    }
    config = validate(ServeConfig, {"model": arguments.model, **settings})
    from serve import fast_path

    joins = arguments.ray_address or os.environ.get("RAY_ADDRESS")
    if not joins:
        fast_path.enable()
    import ray

    from serve.app import start
    from serve.metrics import targets

    url = start(config, host=arguments.host, port=arguments.port, ray_address=arguments.ray_address)
    print(f"serving  {config.model}\nscore    POST {url}/v1/score\nAPI page {url}/docs")
    print(f"try it   {url}/playground")
    print(f"metrics  http://{targets()[0]}/metrics")
    print(f"Ray      {ray.get_runtime_context().gcs_address}\nready; Ctrl-C stops", flush=True)
    stop = threading.Event()
    for signal_number in (signal.SIGINT, signal.SIGTERM):  # only now: Ray sets its own at start
        signal.signal(signal_number, lambda *_: stop.set())
    while not stop.wait(1.0):
        pass
    if joins:  # a private cluster ends with us
        from ray import serve as ray_serve

        from serve.app import APP_NAME

        ray_serve.delete(APP_NAME)
    ray.shutdown()
    return 0


def token(arguments: argparse.Namespace) -> int:
    from serve.auth import add_token

    scopes = [scope.strip() for scope in arguments.scopes.split(",")]
    made = add_token(Path(arguments.file), arguments.name, scopes, replace=arguments.replace)
    print(made)
    print(f"scopes {', '.join(scopes)}; {arguments.file} holds its digest only", file=sys.stderr)
    return 0


def score(arguments: argparse.Namespace) -> int:
    from reward_actor.files import group_of, read_rows, scored_row, write_rows

    loading = _loading(arguments)
    rows = list(read_rows(arguments.input))
    groups = [group_of(row, place) for place, row in rows]
    with _scorer(arguments.model, loading) as score:
        scores = score(groups)
    num_errors = sum(error is not None for result in scores for error in result.errors)
    write_rows(
        arguments.output,
        (scored_row(row, result) for (_, row), result in zip(rows, scores, strict=True)),
    )
    num_scored = sum(len(result.rewards) for result in scores) - num_errors
    print(f"scored {num_scored} completions of {len(rows)} prompts into {arguments.output}")
    if num_errors:
        print(f"{num_errors} completions have no reward; see their `errors`", file=sys.stderr)
    return 0


@contextmanager
def _scorer(model: str, loading: dict[str, Any]) -> Iterator[Callable[[Any], Any]]:
    if _is_url(model):
        from reward_actor.client import RewardClient

        with RewardClient(model) as client:
            yield client.score_groups
        return
    from reward_actor.scorer import RewardScorer

    yield RewardScorer.from_pretrained(model, **loading).score


def rollout(arguments: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import Progress

    from reward_actor.cluster import connect
    from reward_actor.files import prompt_of, read_rows, rollout_row, write_rows
    from reward_actor.rollout import (
        Engine,
        Sampling,
        longest_needed,
        sample,
        start_rollout_actors,
    )

    prompts = [prompt_of(row, place) for place, row in read_rows(arguments.prompts)]
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
    engine = Engine(
        arguments.policy,
        num_gpus=num_gpus,
        max_model_len=arguments.max_model_len
        or longest_needed(arguments.policy, prompts, sampling),
        dtype=arguments.dtype,
        gpu_memory_utilization=arguments.gpu_memory_utilization,
        cpu_kv_cache_gib=arguments.cpu_kv_cache_gib,
    )
    connect(2.0 * arguments.num_actors + 2, address=arguments.ray_address, log_to_driver=False)
    scorer: Any = arguments.scorer
    if scorer and Path(scorer).is_dir():
        from reward_actor.actor import start_scorer_actor

        scorer = start_scorer_actor(scorer, num_gpus=min(num_gpus, 1))
    actors = start_rollout_actors(engine, arguments.num_actors, scorer)

    import ray

    print(f"engines ready; completions travel as: {ray.get(actors[0].ready.remote())}")
    rollouts: dict[int, Any] = {}
    try:
        with Progress(console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("rollouts", total=len(prompts))
            for index, rollout in sample(actors, prompts, sampling):
                rollouts[index] = rollout
                progress.advance(task)
    finally:  # what was sampled before a failure is kept
        write_rows(arguments.output, (rollout_row(rollouts[i]) for i in sorted(rollouts)))
    num_completions = sum(len(rollout.completions) for rollout in rollouts.values())
    print(f"{num_completions} completions of {len(prompts)} prompts in {arguments.output}")
    num_failed = sum(rollout.error is not None for rollout in rollouts.values())
    if num_failed:
        print(f"{num_failed} prompts were not sampled; see their `error`", file=sys.stderr)
    ray.shutdown()
    return 0


def convert(arguments: argparse.Namespace) -> int:
    from reward_actor.convert import convert

    contract = convert(
        arguments.source,
        arguments.destination,
        tokenizer_from=arguments.tokenizer_from,
        format=arguments.format,
        dtype=arguments.dtype,
        device=arguments.device,
        trust_remote_code=arguments.trust_remote_code,
    )
    print(f"reward model: {arguments.destination}")
    print(f"format {contract.format}, {contract.dtype}, at most {contract.max_length} tokens")
    if (contract.mean, contract.std) != (0.0, 1.0):
        print(f"reward = (raw score - {contract.mean:g}) / {contract.std:g}")
    return 0


def ensemble(arguments: argparse.Namespace) -> int:
    from reward_actor.ensemble import write_ensemble

    readout = write_ensemble(arguments.directory, arguments.members, arguments.combine, arguments.k)
    print(f"ensemble: {arguments.directory}")
    k = f", k {readout.k:g}" if readout.combine == "mean_minus_std" else ""
    print(f"{readout.combine} of {len(readout)} members{k}: {', '.join(readout.names)}")
    return 0


def doctor(arguments: argparse.Namespace) -> int:
    from reward_actor.doctor import checks

    failed = 0
    for check in checks():
        print(f"{'ok  ' if check.ok else 'FAIL'}  {check.name:<14} {check.found}")
        if not check.ok:
            failed += 1
            print(f"      -> {check.advice}")
    return 1 if failed else 0
