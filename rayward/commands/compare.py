"""`rayward compare A B DATA`."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from rayward.commands.eval import add_data
from rayward.loading import LOADING, add_loading, chosen
from reward_actor.terminal import out, put, warn

if TYPE_CHECKING:
    from trainer.evaluation.compare import ModelComparison, ModelResult

NAME = "compare"
HELP = "whether one of two models or services is better, and where they differ"
EXTRA = "train"
_SHOWN = 300  # characters of a text in the table


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", metavar="A", help="directory or URL of a model")
    parser.add_argument("b", metavar="B", help="of the other one")
    add_data(parser)
    parser.add_argument(
        "--show",
        type=int,
        default=10,
        metavar="N",
        help="how many of the pairs that they differ most about [%(default)s]",
    )
    add_loading(parser)


def run(arguments: argparse.Namespace) -> int:
    from trainer.config.data import Columns
    from trainer.evaluation.compare import compare_models

    if arguments.show < 0:
        raise ValueError(f"--show is {arguments.show}; give 0 or more")
    found = compare_models(
        arguments.a,
        arguments.b,
        arguments.data,
        columns=Columns.model_validate(chosen(arguments, Columns.model_fields)),
        num_shown=arguments.show,
        **chosen(arguments, LOADING),
    )
    if arguments.json:
        put(json.dumps(found.as_dict()))
    else:
        _print(found)
    return 0


def _print(found: ModelComparison) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(file=out())
    models = Table("", "model", "model_version", "accuracy", "95 % interval", "dropped")
    for name, one in (("A", found.a), ("B", found.b)):
        models.add_row(name, *map(escape, _cells(one)))
    console.print(models)
    ahead = found.difference
    console.print(
        f"B is ahead of A by {ahead.mean:+.4f} ({ahead.low:+.4f} to {ahead.high:+.4f}, standard "
        f"error {ahead.stderr:.4f}) on {found.num_pairs:,} pairs of {found.num_prompts:,} prompts: "
        + (f"{found.better} is better" if found.better else "neither is shown to be better")
    )
    ranks = found.rank_correlation
    console.print(
        f"They decide {found.agreement:.1%} of the pairs alike; rank correlation of the rewards "
        + ("not defined" if ranks is None else f"{ranks:.3f}")
    )
    for warning in found.warnings:
        warn(warning)
    if found.most_different:
        pairs = Table("row", "A", "B", "prompt", "chosen", "rejected", show_lines=True)
        for pair in found.most_different:
            texts = (pair.prompt, pair.chosen, pair.rejected)
            pairs.add_row(
                str(pair.row),
                f"{pair.margin_a:+.2f}",
                f"{pair.margin_b:+.2f}",
                *(escape(_shortened(text or "-")) for text in texts),
            )
        console.print("\nWhere they differ most (margins in standard deviations of the rewards):")
        console.print(pairs)


def _cells(one: ModelResult) -> tuple[str, ...]:
    reasons = ", ".join(f"{num} {name}" for name, num in one.errors.items())
    return (
        one.model,
        one.model_version,
        f"{one.accuracy:.4f}",
        f"{one.accuracy_low:.4f} to {one.accuracy_high:.4f}",
        f"{one.num_dropped:,}" + (f" ({reasons})" if reasons else ""),
    )


def _shortened(text: str) -> str:
    return text if len(text) <= _SHOWN else text[: _SHOWN - 4] + " ..."
