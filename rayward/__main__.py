"""`python -m rayward COMMAND ...`: finds the command, and says which there are."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from rayward.commands import (
    compare,
    convert,
    doctor,
    ensemble,
    init_model,
    rollout,
    score,
    serve,
    token,
    train,
)
from rayward.commands import eval as evaluate
from reward_actor.command_line import Parser, complain, nearest, run_command
from reward_actor.terminal import put

# As `rayward --help` shows them.
_TOPICS = {
    "train": (train, init_model),
    "measure": (evaluate, compare),
    "serve and score": (serve, token, score, rollout),
    "tools": (convert, ensemble, doctor),
}
COMMANDS = {command.NAME: command for topic in _TOPICS.values() for command in topic}


def run(argv: Sequence[str] | None = None) -> int:
    """See `rayward.main`."""
    name, *arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        put(_help())
        return 0
    if name == "--version":
        put(f"rayward {_version()}")
        return 0
    if name not in COMMANDS:
        near = nearest(name, [*COMMANDS, "--help", "--version"], "rayward --help lists them")
        return complain(f"there is no command {name}{near}")
    # Loading weights shows a bar, and warns of settings that matter to other uses.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    return run_command(
        lambda: make_parser(name), COMMANDS[name].run, arguments, COMMANDS[name].EXTRA
    )


def make_parser(name: str) -> Parser:
    """Of the command of this name."""
    parser = Parser(f"rayward {name}", COMMANDS[name].HELP)
    COMMANDS[name].add_options(parser)
    return parser


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("rayward")
    except PackageNotFoundError:  # a Ray job's working directory, say
        return "that is not installed"


def _help() -> str:
    topics = "\n\n".join(
        "\n".join([f"{topic}:", *(f"  {one.NAME:<12}{one.HELP}" for one in commands)])
        for topic, commands in _TOPICS.items()
    )
    return (
        "usage: rayward COMMAND ...\n\n"
        "A reward service for RLHF: train, measure and serve reward models.\n\n"
        f"{topics}\n\n"
        "rayward COMMAND --help lists the options; rayward --version says which version this is.\n"
        "Exit codes: 0 done; 1 a check or a training failed, or no completion got a reward; 2 "
        "wrong input; 130 interrupted."
    )


if __name__ == "__main__":
    from rayward import main

    sys.exit(main())
