"""`python -m trainer --config FILE [--section.key value ...] [--output-dir DIR]`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec

from reward_actor.command_line import Parser, complain, run_command, run_process
from reward_actor.config_errors import as_typed
from reward_actor.terminal import note, say
from trainer.config.options import add_arguments, config_from_arguments, typed_keys
from trainer.config.train import TrainConfig
from trainer.errors import TrainingError

DESCRIPTION = (
    "Train a Bradley-Terry reward model. The same command resumes from the last checkpoint "
    "after an interruption."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the arguments say; see `run` for the exit status. Without `argv` it is a command of
    its own, as `rayward train`."""
    if argv is None:
        return run_process("train", lambda: main(sys.argv[1:]))
    return run_command(_parser, run, argv, "train")


def _parser() -> Parser:
    parser = Parser("python -m trainer", DESCRIPTION)
    add_options(parser)
    return parser


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.usage = (
        "%(prog)s [--config FILE|PRESET] [--section.key value ...] [--output-dir DIR] [--folds K]"
    )
    parser.add_argument(
        "--folds",
        type=int,
        metavar="K",
        help="train K models, each on all but one of K parts of the prompts, and measure each on "
        "that part: an accuracy by all prompts, with its standard error",
    )
    add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """The exit status: 0, 1 for a training that failed, 130 for an interrupted one. Raises
    ValueError for what the user can put right."""
    config = config_from_arguments(arguments)
    typed = typed_keys(arguments)
    # All else is imported late: --help and config errors are instant.
    for package in ("torch", "transformers", "ray", "deepspeed"):
        if find_spec(package) is None:  # before data are read, by what needs less
            raise ModuleNotFoundError(name=package)
    try:
        _check_device(config)
        if arguments.config is None:
            arguments.config = _chosen_preset(config)
            config = config_from_arguments(arguments)
            say(_main_settings(config))
        if arguments.folds is None:
            from trainer.report.summary import show_summary
            from trainer.run import train

            result = train(config)
            show_summary(result.export_dir, result.metrics, config.data)
        else:
            from trainer.folds import train_folds

            train_folds(config, arguments.folds)
    except ValueError as error:
        raise ValueError(as_typed(str(error), typed)) from error
    except TrainingError as error:
        return complain(error, 1)
    except KeyboardInterrupt:
        note("interrupted; the same command resumes from the last checkpoint")
        return 130
    return 0


def _chosen_preset(config: TrainConfig) -> str:
    """What is trained decides the settings that are not given."""
    from trainer.presets import preset_for

    preset, why = preset_for(config.model.path, has_adapter=config.adapter.rank > 0)
    say(f"settings of --config {preset}, for {why}:")
    return preset


def _main_settings(config: TrainConfig) -> str:
    training = config.training
    length = (
        f"{training.max_steps} steps" if training.max_steps else f"{training.num_epochs} epochs"
    )
    return (
        f"  learning rate {config.optimizer.learning_rate:g}, {length} of "
        f"{training.global_batch_pairs} pairs a step, {config.model.dtype}, "
        f"{config.distributed.num_workers} workers, ZeRO {config.distributed.zero_stage}"
    )


def _check_device(config: TrainConfig) -> None:
    """A training on this machine alone needs its GPU here; that of a cluster may be anywhere."""
    if config.distributed.device == "cuda" and not os.environ.get("RAY_ADDRESS"):
        from reward_actor.devices import resolve_device

        resolve_device("cuda", "distributed.device")


if __name__ == "__main__":
    sys.exit(main())
