"""`python -m trainer --config FILE [--section.key value ...] [--output-dir DIR]`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from trainer.config.options import add_arguments, config_from_arguments
from trainer.console import TrainingError


def main(argv: Sequence[str] | None = None, prog: str = "python -m trainer") -> int:
    """Train as the arguments say; the exit status: 0, 2 for what the user can put right, 1 for a
    training that failed, 130 for an interrupted one."""
    parser = argparse.ArgumentParser(
        prog=prog,
        allow_abbrev=False,
        usage=f"{prog} --config FILE [--section.key value ...] [--output-dir DIR] [--folds K]",
        description="Train a Bradley-Terry reward model. The same command goes on from the last "
        "checkpoint after an interruption.",
    )
    parser.add_argument(
        "--folds",
        type=int,
        metavar="K",
        help="train K models, each on all but one of K parts of the prompts, and measure each on "
        "that part: an accuracy by all prompts, with its standard error",
    )
    add_arguments(parser)
    args, unknown = parser.parse_known_args(argv)
    try:
        config = config_from_arguments(args, unknown)
        # Imported late: --help and config errors are instant.
        if args.folds is None:
            from trainer.run import train

            train(config)
        else:
            from trainer.folds import train_folds

            train_folds(config, args.folds)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except TrainingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
