"""The front door, `rayward COMMAND ...`: what every command accepts, and its exit codes."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

import rayward_commands as run
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
    added = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, function: Command, help: str) -> argparse.ArgumentParser:
        sub = added.add_parser(name, help=help, description=help, allow_abbrev=False)
        sub.set_defaults(command=function, parser=sub)
        return sub

    added.add_parser("train", help="train a reward model from preferences and export it")

    sub = command("init-model", run.init_model, "make a small base model: tokenizer and network")
    sub.add_argument("directory", metavar="DIR")
    sub.add_argument("--corpus", help="text to train the tokenizer on: .jsonl, .jsonl.gz, .txt")
    sub.add_argument("--tokenizer-from", metavar="DIR", help="use this model's tokenizer instead")
    sub.add_argument("--vocab-size", type=int, default=2048)
    sub.add_argument("--hidden-size", type=int, default=128)
    sub.add_argument("--num-layers", type=int, default=2)
    sub.add_argument("--max-length", type=int, default=2048, help="positions of the network")
    sub.add_argument("--seed", type=int, default=0)

    sub = command("eval", run.evaluate, "what preferences say about a model or a running service")
    sub.add_argument("model", metavar="MODEL|URL")
    sub.add_argument("data", metavar="DATA", help="pairs or rankings: .jsonl, .jsonl.gz, .parquet")
    sub.add_argument("--json", action="store_true", help="print one JSON object")
    sub.add_argument(
        "--rewardbench",
        type=int,
        choices=(1, 2),
        help="DATA is RewardBench of this version: score it by its own rules",
    )
    sub.add_argument(
        "--over-long",
        choices=("drop", "truncate_left"),
        default=argparse.SUPPRESS,
        help="what happens to a row with too long a sequence [drop]",
    )
    sub.add_argument(
        "--deduplicate",
        action=argparse.BooleanOptionalAction,
        default=argparse.SUPPRESS,
        help="use rows of equal tokens, labels and subset once [no]",
    )
    _add_columns(sub)
    _add_loading(sub)

    sub = command("serve", run.serve, "serve a reward model over HTTP until interrupted")
    sub.add_argument("model", metavar="MODEL")
    sub.add_argument("--host", default="127.0.0.1", help="address to listen on [%(default)s]")
    sub.add_argument("--port", type=int, default=8000)
    sub.add_argument("--ray-address", help="join this Ray cluster instead of starting one")
    _add_serve_settings(sub)

    sub = command("token", run.token, "make a token for callers of the service")
    sub.add_argument("name", metavar="NAME", help="who will use it")
    sub.add_argument("--file", required=True, help="token file of `rayward serve`; made if missing")
    sub.add_argument("--scopes", default="score", help="score, admin or score,admin [%(default)s]")
    sub.add_argument(
        "--replace", action="store_true", help="end the tokens that NAME has so far at once"
    )

    sub = command("score", run.score, "score a file of prompts and completions")
    sub.add_argument("model", metavar="MODEL|URL")
    sub.add_argument("input", metavar="INPUT", help=".jsonl rows of prompt and completions")
    sub.add_argument("output", metavar="OUTPUT", help=".jsonl rows with rewards")
    _add_loading(sub)

    sub = command("rollout", run.rollout, "sample completions with vLLM and score them")
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

    sub = command("convert", run.convert, "turn another system's reward model into ours")
    sub.add_argument("source", metavar="SRC", help="directory of the reward model or adapter")
    sub.add_argument("destination", metavar="DST", help="directory to write; must not exist")
    sub.add_argument("--tokenizer-from", metavar="DIR", help="use this directory's tokenizer")
    sub.add_argument("--format", choices=("chat", "text"), help="[chat where there is a template]")
    sub.add_argument("--dtype", default="auto", help="of the weights [what the source holds]")
    sub.add_argument("--device", default="cpu", help="where the golden samples are scored")
    sub.add_argument(
        "--trust-remote-code", action="store_true", help="run the Python code that SRC comes with"
    )

    sub = command("ensemble", run.ensemble, "make several reward models one, for score and serve")
    sub.add_argument("directory", metavar="DIR", help="directory to write ensemble.json into")
    sub.add_argument("members", metavar="MEMBER", nargs="+", help="directories of reward models")
    sub.add_argument(
        "--combine",
        choices=("mean", "min", "mean_minus_std"),
        default="mean",
        help="how their rewards become one [%(default)s]",
    )
    sub.add_argument("--k", type=float, default=1.0, help="of mean_minus_std [%(default)s]")

    command("doctor", run.doctor, "check the installation and the devices, and say what to do")
    return parser


def _add_loading(sub: argparse.ArgumentParser) -> None:
    """Options that are absent unless they are given: a service that has its model refuses them."""
    for name, help in (
        ("--device", "auto, cpu, cuda, cuda:1, ..."),
        ("--dtype", "auto (the contract's), float32, bfloat16"),
        ("--attention", "auto (the fastest exact path), forest, padded"),
    ):
        sub.add_argument(name, default=argparse.SUPPRESS, help=help)
    sub.add_argument(
        "--trust-remote-code",
        action="store_true",
        default=argparse.SUPPRESS,
        help="run Python code found in the model",
    )


def _add_columns(sub: argparse.ArgumentParser) -> None:
    from trainer.data_config import Columns

    for name, field in Columns.model_fields.items():
        sub.add_argument(
            "--" + name.replace("_", "-"),
            metavar="NAME",
            default=argparse.SUPPRESS,
            help=f"of DATA: {field.description} [{field.default}]",
        )


def _add_serve_settings(sub: argparse.ArgumentParser) -> None:
    from serve.config import ServeConfig

    for name, field in ServeConfig.model_fields.items():
        if name == "model":
            continue
        sub.add_argument(
            "--" + name.replace("_", "-"),
            dest=f"setting_{name}",
            metavar="VALUE",
            help=f"{field.description} [{field.default!r}]".replace("%", "%%"),
        )


if __name__ == "__main__":
    sys.exit(main())
