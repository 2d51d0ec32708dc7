"""`rayward score MODEL|URL INPUT OUTPUT`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from rayward.loading import add_loading, is_url, loading_options
from rayward.scoring import ScoringProgress, tell_unscored
from reward_actor.terminal import phase, put, warn

if TYPE_CHECKING:
    from reward_actor.groups import GroupScores

NAME = "score"
HELP = "score a file of prompts and completions"
EXTRA = "serve"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL|URL", help="directory or URL of a model")
    parser.add_argument(
        "input", metavar="INPUT", help=".jsonl rows of prompt and completions, or pairs"
    )
    parser.add_argument("output", metavar="OUTPUT", nargs="?", help=".jsonl rows with rewards")
    parser.add_argument(
        "--explain",
        metavar="ROW",
        type=int,
        help="print how the rewards of this row of INPUT, from 1, come about; needs no OUTPUT",
    )
    add_loading(parser)


def run(arguments: argparse.Namespace) -> int:
    from reward_actor.files import group_of, read_rows, scored_row, write_rows

    loading = loading_options(arguments)
    rows = list(read_rows(arguments.input))
    if arguments.explain is not None:
        return _explain(arguments, rows, loading)
    if arguments.output is None:
        raise ValueError("give OUTPUT, a .jsonl file to write, or --explain ROW")
    for place, row in rows:  # told before a large model is loaded
        group_of(row, place)
    scores: list[GroupScores] = []
    with (
        _scorer(arguments.model, loading) as (score, path, format, at_once),
        ScoringProgress(len(rows)).shown() as progress,
    ):
        groups = [group_of(row, place, format) for place, row in rows]
        for start in range(0, len(groups), at_once):
            for result in score(groups[start : start + at_once]):
                scores.append(result)
                progress.add(result)
    problems = [
        None if error is None else f"{error.type}: {error.message}"
        for result in scores
        for error in result.errors
    ]
    write_rows(
        arguments.output,
        (scored_row(row, result) for (_, row), result in zip(rows, scores, strict=True)),
    )
    num_scored = problems.count(None)
    put(
        f"scored {num_scored} completions of {len(rows)} prompts into {arguments.output} ({path})"
        f"\n{progress.summary()}"
    )
    return tell_unscored(problems)


def _explain(
    arguments: argparse.Namespace, rows: list[tuple[str, dict[str, Any]]], loading: dict[str, Any]
) -> int:
    from reward_actor.contract import ContractError
    from reward_actor.explain import explain
    from reward_actor.files import group_of
    from reward_actor.scorer import RewardScorer

    if is_url(arguments.model):
        raise ValueError("--explain needs the model's directory; a service keeps its tokens")
    if not 1 <= arguments.explain <= len(rows):
        raise ValueError(f"--explain is {arguments.explain}; INPUT has rows 1 to {len(rows)}")
    place, row = rows[arguments.explain - 1]
    scorer = RewardScorer.from_pretrained(arguments.model, check_golden=False, **loading)
    try:
        scorer.replay()
    except ContractError as error:  # it is such a model that has to be explained
        warn(str(error))
    for line in explain(scorer, group_of(row, place, scorer.contract.format)):
        put(line)
    return 0


@contextmanager
def _scorer(
    model: str, loading: dict[str, Any]
) -> Iterator[tuple[Callable[[Any], Any], str, Literal["chat", "text"], int]]:
    """What scores groups, the path that they take there, the format of the contract, and how many
    groups to score at once: few enough for progress that moves."""
    if is_url(model):
        from reward_actor.client.sync import RewardClient

        with RewardClient(model) as client:
            client.check_reachable()
            info = client.info()
            yield client.score_groups, info.path, info.format, 2048  # several requests at a time
        return
    from reward_actor.devices import resolve_device
    from reward_actor.scorer import RewardScorer

    resolve_device(loading.get("device", "auto"))
    with phase(f"loading {model}"):
        scorer = RewardScorer.from_pretrained(model, **loading)
    yield scorer.score, f"{scorer.path}, {scorer.dtype}", scorer.contract.format, 256
