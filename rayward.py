"""The front door: `rayward COMMAND ...`. Thin; every command imports what it needs when it runs."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from reward_actor.errors import RewardServiceError

Command = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Exit codes: 0 done, 1 a check failed, 2 wrong input, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["train"]:  # its options are those of the configuration
        from trainer.__main__ import main as train

        return train(arguments[1:], prog="rayward train")
    parsed, unknown = _parser().parse_known_args(arguments)
    command: Command = parsed.command
    # Loading weights shows a bar, and warns of settings that matter to other uses.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        if unknown:
            from reward_actor.settings import did_you_mean

            name = unknown[0].partition("=")[0]
            raise ValueError(
                f"unknown argument {name}"
                + did_you_mean(name, list(parsed.parser._option_string_actions))
            )
        return command(parsed)
    except (ValueError, OSError, RewardServiceError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rayward", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Command, help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help, allow_abbrev=False)
        sub.set_defaults(command=run, parser=sub)
        return sub

    commands.add_parser("train", help="train a reward model from preferences and export it")

    sub = command("init-model", _init_model, "make a small base model: tokenizer and network")
    sub.add_argument("directory", metavar="DIR")
    sub.add_argument("--corpus", help="text to train the tokenizer on: .jsonl, .jsonl.gz, .txt")
    sub.add_argument("--tokenizer-from", metavar="DIR", help="use this model's tokenizer instead")
    sub.add_argument("--vocab-size", type=int, default=2048)
    sub.add_argument("--hidden-size", type=int, default=128)
    sub.add_argument("--num-layers", type=int, default=2)
    sub.add_argument("--max-length", type=int, default=2048, help="positions of the network")
    sub.add_argument("--seed", type=int, default=0)

    sub = command("eval", _eval, "accuracy on preference pairs, of a model or a running service")
    sub.add_argument("model", metavar="MODEL|URL")
    sub.add_argument("data", metavar="DATA", help="pairs: .jsonl, .jsonl.gz, .parquet")
    sub.add_argument("--json", action="store_true", help="print one JSON object")
    _add_loading(sub)

    sub = command("serve", _serve, "serve a reward model over HTTP until interrupted")
    sub.add_argument("model", metavar="MODEL")
    sub.add_argument("--host", default="127.0.0.1", help="address to listen on [%(default)s]")
    sub.add_argument("--port", type=int, default=8000)
    sub.add_argument("--ray-address", help="join this Ray cluster instead of starting one")
    _add_serve_settings(sub)

    sub = command("score", _score, "score a file of prompts and completions")
    sub.add_argument("model", metavar="MODEL|URL")
    sub.add_argument("input", metavar="INPUT", help=".jsonl rows of prompt and completions")
    sub.add_argument("output", metavar="OUTPUT", help=".jsonl rows with rewards")
    _add_loading(sub)

    sub = command("rollout", _rollout, "sample completions with vLLM and score them")
    sub.add_argument("policy", metavar="POLICY", help="directory of the policy")
    sub.add_argument("prompts", metavar="PROMPTS", help=".jsonl rows of prompt")
    sub.add_argument("output", metavar="OUTPUT", help=".jsonl rows of rollouts")
    sub.add_argument(
        "--scorer",
        help="URL of a service, name of a Serve application, directory of a reward model, or "
        "nothing: sample only",
    )
    sub.add_argument("--num-actors", type=int, default=1)
    sub.add_argument("--num-completions", type=int, default=4)
    sub.add_argument("--max-tokens", type=int, default=256)
    sub.add_argument("--temperature", type=float, default=1.0)
    sub.add_argument("--top-p", type=float, default=1.0)
    sub.add_argument("--num-gpus", type=int, help="GPUs per actor [1 where there is one, else 0]")
    sub.add_argument("--dtype", default="auto", help="of the policy")
    sub.add_argument(
        "--max-model-len", type=int, help="tokens of prompt and completion [what they need]"
    )
    sub.add_argument("--gpu-memory-utilization", type=float, default=0.9)
    sub.add_argument("--cpu-kv-cache-gib", type=int, default=1)
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--ray-address", help="join this Ray cluster instead of starting one")

    sub = command("convert", _convert, "turn another system's reward model into ours")
    sub.add_argument("source", metavar="SRC", help="directory of the reward model or adapter")
    sub.add_argument("destination", metavar="DST", help="directory to write; must not exist")
    sub.add_argument("--tokenizer-from", metavar="DIR", help="use this directory's tokenizer")
    sub.add_argument("--format", choices=("chat", "text"), help="[chat where there is a template]")
    sub.add_argument("--dtype", default="auto", help="of the weights [what the source holds]")
    sub.add_argument("--device", default="cpu", help="where the golden samples are scored")
    sub.add_argument(
        "--trust-remote-code", action="store_true", help="run the Python code that SRC comes with"
    )

    sub = command("ensemble", _ensemble, "make several reward models one, for score and serve")
    sub.add_argument("directory", metavar="DIR", help="directory to write ensemble.json into")
    sub.add_argument("members", metavar="MEMBER", nargs="+", help="directories of reward models")
    sub.add_argument(
        "--combine",
        choices=("mean", "min", "mean_minus_std"),
        default="mean",
        help="how their rewards become one [%(default)s]",
    )
    sub.add_argument("--k", type=float, default=1.0, help="of mean_minus_std [%(default)s]")

    command("doctor", _doctor, "check the installation and the devices, and say what to do")
    return parser


def _add_loading(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    sub.add_argument("--dtype", default="auto", help="auto (the contract's), float32, bfloat16")
    sub.add_argument(
        "--attention", default="auto", help="auto (the fastest exact path), forest, padded"
    )
    sub.add_argument(
        "--trust-remote-code", action="store_true", help="run Python code found in the model"
    )


def _loading(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `_add_loading` read, as `RewardScorer.from_pretrained` takes it."""
    names = ("device", "dtype", "attention", "trust_remote_code")
    return {name: getattr(arguments, name) for name in names}


def _add_serve_settings(sub: argparse.ArgumentParser) -> None:
    from serve.config import ServeConfig

    for name, field in ServeConfig.model_fields.items():
        if name == "model":
            continue
        sub.add_argument(
            "--" + name.replace("_", "-"),
            dest=f"setting_{name}",
            metavar="VALUE",
            help=f"{field.description} [{field.default!r}]",
        )


def _init_model(arguments: argparse.Namespace) -> int:
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


def _eval(arguments: argparse.Namespace) -> int:
    from trainer.evaluate import evaluate_model

    result = evaluate_model(arguments.model, arguments.data, **_loading(arguments))
    if arguments.json:
        print(json.dumps(result))
        return 0
    for name, value in result.items():
        print(f"{name:>16}  {value:.4f}" if isinstance(value, float) else f"{name:>16}  {value}")
    return 0


def _serve(arguments: argparse.Namespace) -> int:
    from reward_actor.settings import validate
    from serve.config import ServeConfig

    prefix = "setting_"
    settings = {
        name.removeprefix(prefix): value
        for name, value in vars(arguments).items()
        if name.startswith(prefix) and value is not None
    }
    config = validate(ServeConfig, {"model": arguments.model, **settings})
    import ray

    from serve.app import start

    url = start(config, host=arguments.host, port=arguments.port, ray_address=arguments.ray_address)
    print(f"serving  {config.model}\nscore    POST {url}/v1/score\nAPI page {url}/docs")
    print(f"Ray      {ray.get_runtime_context().gcs_address}\nready; Ctrl-C stops", flush=True)
    stop = threading.Event()
    for signal_number in (signal.SIGINT, signal.SIGTERM):  # only now: Ray sets its own at start
        signal.signal(signal_number, lambda *_: stop.set())
    while not stop.wait(1.0):
        pass
    if arguments.ray_address or os.environ.get("RAY_ADDRESS"):  # a private cluster ends with us
        from ray import serve as ray_serve

        from serve.app import APP_NAME

        ray_serve.delete(APP_NAME)
    ray.shutdown()
    return 0


def _score(arguments: argparse.Namespace) -> int:
    from reward_actor.files import group_of, read_rows, scored_row, write_rows

    rows = list(read_rows(arguments.input))
    groups = [group_of(row, place) for place, row in rows]
    with _scorer(arguments) as score:
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
def _scorer(arguments: argparse.Namespace) -> Iterator[Callable[[Any], Any]]:
    if arguments.model.startswith(("http://", "https://")):
        from reward_actor.client import RewardClient

        with RewardClient(arguments.model) as client:
            yield client.score_groups
        return
    from reward_actor.scorer import RewardScorer

    yield RewardScorer.from_pretrained(arguments.model, **_loading(arguments)).score


def _rollout(arguments: argparse.Namespace) -> int:
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


def _convert(arguments: argparse.Namespace) -> int:
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


def _ensemble(arguments: argparse.Namespace) -> int:
    from reward_actor.ensemble import write_ensemble

    readout = write_ensemble(arguments.directory, arguments.members, arguments.combine, arguments.k)
    print(f"ensemble: {arguments.directory}")
    k = f", k {readout.k:g}" if readout.combine == "mean_minus_std" else ""
    print(f"{readout.combine} of {len(readout)} members{k}: {', '.join(readout.names)}")
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from reward_actor.doctor import checks

    failed = 0
    for check in checks():
        print(f"{'ok  ' if check.ok else 'FAIL'}  {check.name:<14} {check.found}")
        if not check.ok:
            failed += 1
            print(f"      -> {check.advice}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
