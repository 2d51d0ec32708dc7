"""`rayward eval MODEL|URL DATA`."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from rayward.loading import add_loading, as_options, chosen, loading_options

NAME = "eval"
HELP = "what preferences say about a model or a running service"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL|URL")
    add_data(parser)
    parser.add_argument(
        "--rewardbench",
        type=int,
        choices=(1, 2),
        help="DATA is RewardBench of this version: score it by its own rules",
    )
    parser.add_argument(
        "--over-long",
        choices=("drop", "truncate_left"),
        default=argparse.SUPPRESS,
        help="what happens to a row with too long a sequence [drop]",
    )
    parser.add_argument(
        "--deduplicate",
        action=argparse.BooleanOptionalAction,
        default=argparse.SUPPRESS,
        help="use rows of equal tokens, labels and subset once [no]",
    )
    add_loading(parser)


def run(arguments: argparse.Namespace) -> int:
    from trainer.config.data import Columns

    columns = chosen(arguments, Columns.model_fields)
    rules = chosen(arguments, ("over_long", "deduplicate"))
    if arguments.rewardbench:
        if columns or rules:
            raise ValueError(
                f"{as_options([*columns, *rules])}: RewardBench has columns and rules of its own"
            )
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
        print(json.dumps(result))
    else:
        warnings = result.pop("warnings", [])
        _print_evaluation(result)
        for warning in warnings:
            print(f"warning: {warning}", file=sys.stderr)
    return 0


def add_data(parser: argparse.ArgumentParser) -> None:
    """DATA and how its columns are called, and how the result is printed."""
    from trainer.config.data import Columns

    parser.add_argument(
        "data", metavar="DATA", help="pairs or rankings: .jsonl, .jsonl.gz, .parquet"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    for name, field in Columns.model_fields.items():
        parser.add_argument(
            "--" + name.replace("_", "-"),
            metavar="NAME",
            default=argparse.SUPPRESS,
            help=f"of DATA: {field.description} [{field.default}]",
        )


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
