"""`rayward eval MODEL|URL DATA`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rayward.loading import add_loading, as_options, chosen, loading_options
from reward_actor.command_line import Flag, add_setting
from reward_actor.terminal import out, put, warn

if TYPE_CHECKING:
    from rich.table import Table

NAME = "eval"
HELP = "what preferences say about a model or a running service"
EXTRA = "train"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "Where a number looks wrong, `rayward score MODEL DATA --explain ROW` shows the tokens of "
        "a row, which of them is read, and why."
    )
    parser.add_argument("model", metavar="MODEL|URL", help="directory or URL of a model")
    add_data(parser)
    parser.add_argument(
        "--rewardbench",
        type=int,
        choices=(1, 2),
        metavar="1|2",
        help="DATA is RewardBench of this version: score it by its own rules [none]",
    )
    parser.add_argument(
        "--over-long",
        choices=("drop", "truncate_left"),
        metavar="drop|truncate_left",
        default=argparse.SUPPRESS,
        help="what happens to a row with too long a sequence [drop]",
    )
    parser.add_argument(
        "--deduplicate",
        action=Flag,
        default=argparse.SUPPRESS,
        help="use rows of equal tokens, labels and subset once [off]",
    )
    add_loading(parser)


def run(arguments: argparse.Namespace) -> int:
    from trainer.config.data import Columns

    columns = chosen(arguments, Columns.model_fields)
    rules = chosen(arguments, ("over_long", "deduplicate"))
    if arguments.rewardbench and (columns or rules):
        raise ValueError(
            f"{as_options([*columns, *rules])}: RewardBench has its own columns and rules"
        )
    if arguments.rewardbench:
        from trainer.evaluation.rewardbench import evaluate_rewardbench

        result = evaluate_rewardbench(
            arguments.model, arguments.data, arguments.rewardbench, **loading_options(arguments)
        )
    else:
        from trainer.evaluation.evaluate import evaluate_model

        result = evaluate_model(
            arguments.model,
            arguments.data,
            columns=Columns.model_validate(columns),
            **rules,
            **loading_options(arguments),
        )
    if arguments.json:
        put(json.dumps(result))
    else:
        warnings = result.pop("warnings", [])
        _print_evaluation(result)
        for warning in warnings:
            warn(warning)
    return 0


def add_data(parser: argparse.ArgumentParser) -> None:
    """DATA and how its columns are called, and how the result is printed."""
    from trainer.config.data import Columns

    parser.add_argument(
        "data", metavar="DATA", help="pairs or rankings: .jsonl, .jsonl.gz, .parquet"
    )
    parser.add_argument("--json", action=Flag, help="print one JSON object [off]")
    columns = parser.add_argument_group("columns of DATA")
    for name, field in Columns.model_fields.items():
        add_setting(columns, name, field, dest=name)


def _print_evaluation(result: Mapping[str, Any]) -> None:
    """What each number is, and what is good; the names of JSON are in no table."""
    from rich.console import Console

    tables = _benchmark_tables if "benchmark" in result else _pair_tables
    console = Console(file=out(), highlight=False)
    for table in tables(result):
        console.print(table)


def _pair_tables(of: Mapping[str, Any]) -> list[Table]:
    """Of `evaluate_model`."""
    from trainer.report.describe import chance

    not_counted = f"{of['num_ties']:,} ties and {of['num_dropped']:,} dropped rows are not counted"
    low, high = 100 * of["accuracy_low"], 100 * of["accuracy_high"]
    verdict = chance(of["accuracy_low"], of["accuracy_high"])
    correlation = of["length_correlation"]
    rows = {
        "accuracy": (
            _percent(of["accuracy"]),
            f"95 %: {low:.1f} to {high:.1f} %, by prompt; guessing 50 %, higher is better"
            + (f"\n[bold red]{verdict}[/]" if verdict else ""),
        ),
        "pairs": (f"{of['num_pairs']:,}", f"of {of['num_prompts']:,} prompts; {not_counted}"),
        "reward margin": (
            f"{of['reward_margin']:+.3f}",
            f"mean of chosen - rejected, higher is better; of raw scores {of['raw_margin']:+.3f}",
        ),
        "rewards": (
            f"{of['mean_reward']:+.3f}",
            f"mean; from {of['min_reward']:+.3f} to {of['max_reward']:+.3f}",
        ),
        "raw scores": (
            f"{of['mean_raw_score']:+.3f}",
            f"mean, before normalisation; from {of['min_raw_score']:+.3f} to "
            f"{of['max_raw_score']:+.3f}",
        ),
        "log loss": (
            f"{of['log_loss']:.4f}",
            "of raw scores; guessing 0.6931, lower is better",
        ),
        "calibration error": (
            _percent(of["calibration_error"]),
            "of raw scores: how far confidence and accuracy are apart, lower is better; "
            f"{of['num_calibration_bins']} of 10 bins have pairs",
        ),
        "reward and length": (
            "-" if correlation is None else f"{correlation:+.2f}",
            "correlation; near 0, length decides little",
        ),
        **{
            f"chosen is {side}": (
                _percent(of[f"accuracy_{side}"]),
                f"accuracy of the {of[f'num_{side}']:,} pairs whose chosen side is the {side} one",
            )
            for side in ("shorter", "longer")
            if of[f"num_{side}"]
        },
    }
    tables = [_numbers(f"{of['model']} on {of['data']}", rows, of)]
    if verdict:
        advice = "where a number looks wrong: rayward score MODEL DATA --explain ROW"
        tables[0].caption = f"{tables[0].caption}\n{advice}"
    if of.get("subsets"):
        columns = ("subset", "pairs", "prompts", "accuracy", "reward margin")
        tables.append(
            _table(
                "Subsets",
                columns,
                [
                    (name, f"{one['num_pairs']:,}", f"{one['num_prompts']:,}",
                     _percent(one["accuracy"]), f"{one['reward_margin']:+.3f}")
                    for name, one in of["subsets"].items()
                ],
            )
        )  # fmt: skip
    return tables


def _benchmark_tables(of: Mapping[str, Any]) -> list[Table]:
    """Of `evaluate_rewardbench`."""
    from rich.markup import escape

    parts = "sections" if "sections" in of else "subsets"
    reasons = ", ".join(f"{num} {name}" for name, num in of["errors"].items())
    missing, unknown = of["missing_subsets"], of["unknown_subsets"]
    if isinstance(missing, dict):
        missing = [name for names in missing.values() for name in names]
    rows = {
        "score": (_percent(of["score"]), f"mean of the {parts}, higher is better"),
        "rows": (f"{of['num_rows']:,}", "a prompt with its completions each"),
        "without a reward": (f"{of['num_unscored']:,}", f"completions; {reasons or 'none'}"),
        "missing subsets": (f"{len(missing)}", ", ".join(missing)),
        "unknown subsets": (f"{len(unknown)}", escape(", ".join(unknown))),
    }
    tables = [_numbers(f"{of['benchmark']}: {of['model']} on {of['data']}", rows, of)]
    if "sections" in of:
        sections = [(name, _percent(score)) for name, score in of["sections"].items()]
        tables.append(_table("Sections", ("section", "accuracy"), sections))
    found = [
        (name, f"{one['num_rows']:,}", _percent(one.get("score", one.get("accuracy"))))
        for name, one in of["subsets"].items()
    ]
    return [*tables, _table("Subsets", ("subset", "rows", "score"), found)]


def _numbers(title: str, rows: Mapping[str, tuple[str, str]], of: Mapping[str, Any]) -> Table:
    """A row for each number: what it is called, the number, what it means."""
    from rich.markup import escape
    from rich.table import Table

    caption = f"{of['model_version']}, {of['seconds']:.1f} s"
    table = Table(title=escape(title), caption=caption, show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_column(overflow="fold")
    for name, (number, meaning) in rows.items():
        table.add_row(name, number, meaning)
    return table


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"
