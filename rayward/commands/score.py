"""`rayward score MODEL|URL INPUT OUTPUT`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rayward.loading import add_loading, is_url, loading_options

NAME = "score"
HELP = "score a file of prompts and completions"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL|URL")
    parser.add_argument("input", metavar="INPUT", help=".jsonl rows of prompt and completions")
    parser.add_argument("output", metavar="OUTPUT", help=".jsonl rows with rewards")
    add_loading(parser)


def run(arguments: argparse.Namespace) -> int:
    from reward_actor.files import group_of, read_rows, scored_row, write_rows

    loading = loading_options(arguments)
    rows = list(read_rows(arguments.input))
    groups = [group_of(row, place) for place, row in rows]
    with _scorer(arguments.model, loading) as score:
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
def _scorer(model: str, loading: dict[str, Any]) -> Iterator[Callable[[Any], Any]]:
    if is_url(model):
        from reward_actor.client.sync import RewardClient

        with RewardClient(model) as client:
            yield client.score_groups
        return
    from reward_actor.scorer import RewardScorer

    yield RewardScorer.from_pretrained(model, **loading).score
