"""`python -m rayward COMMAND ...`: the parser, and what exit codes mean."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

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
)
from rayward.commands import eval as evaluate
from rayward.commands import train as train
from reward_actor.errors import RewardServiceError

# In the order of `rayward --help`, after `train`, whose options are those of its configuration.
_COMMANDS = (init_model, evaluate, compare, serve, token, score, rollout, convert, ensemble, doctor)


def run(argv: Sequence[str] | None = None) -> int:
    """See `rayward.main`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == [train.NAME]:
        return train.run_with(arguments[1:])
    parsed, unknown = _parser().parse_known_args(arguments)
    command: Callable[[argparse.Namespace], int] = parsed.command
    # Loading weights shows a bar, and warns of settings that matter to other uses.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        if unknown:
            from reward_actor.config_errors import did_you_mean

            name = unknown[0].partition("=")[0]
            # Nothing public of argparse (Python 3.11 to 3.14) lists a parser's options.
            known = list(parsed.parser._option_string_actions)  # noqa: SLF001
            raise ValueError(f"unknown argument {name}" + did_you_mean(name, known))
        return command(parsed)
    except (ValueError, OSError, RewardServiceError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rayward",
        description="The front door, `rayward COMMAND ...`: what every command accepts, and its "
        "exit codes.",
    )
    added = parser.add_subparsers(required=True, metavar="COMMAND")
    added.add_parser(train.NAME, help=train.HELP)
    for command in _COMMANDS:
        sub = added.add_parser(
            command.NAME, help=command.HELP, description=command.HELP, allow_abbrev=False
        )
        command.add_options(sub)
        sub.set_defaults(command=command.run, parser=sub)
    return parser


if __name__ == "__main__":
    from rayward import main

    sys.exit(main())
