"""`python -m trainer --config FILE [--section.key value ...] [--output-dir DIR]`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from trainer.config.options import add_arguments, config_from_arguments
from trainer.config.train import TrainConfig
from trainer.console import TrainingError, say


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
        if args.config is None:
            args.config = _chosen_preset(config)
            config = config_from_arguments(args)
            say(_main_settings(config))
        # Imported late: --help and config errors are instant.
        if args.folds is None:
            from trainer.report.summary import show_summary
            from trainer.run import train

            result = train(config)
            show_summary(result.export_dir, result.metrics, config.data)
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


if __name__ == "__main__":
    sys.exit(main())
