"""Evaluation of a reward model on preferences: of an exported directory, or of a running service.

Both ways read the same rows and end in the same `trainer.evaluation.metrics`; only who renders and
scores differs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from reward_actor.groups import Group, GroupScores
from trainer.config.data import Columns, Source
from trainer.data.comparisons import Comparison, Comparisons
from trainer.data.load import load_comparisons, read_rows
from trainer.data.rows import BadRows, Row, as_chat
from trainer.data.sources import check_source
from trainer.evaluation import metrics

if TYPE_CHECKING:
    from numpy.typing import NDArray

ScoreGroups = Callable[[Sequence[Group]], list[GroupScores]]
_Evaluated = tuple[Comparisons, "NDArray[np.float64]", int, str]
"""Comparisons, the raw scores (S,) of their sequences, how many were dropped, the model_version."""

# One request's share: far below a service's limits, and done long before its deadline on a CPU.
_TOKENS_PER_CALL = 50_000


def evaluate_model(
    model_or_url: str,
    data: str,
    *,
    columns: Columns | None = None,
    max_pairs: int | None = None,
    over_long: Literal["drop", "truncate_left"] = "drop",
    deduplicate: bool = False,
    **loading: Any,
) -> dict[str, Any]:
    """Evaluate an exported directory, or the service at an http(s) URL, on pairs or rankings.

    `loading` goes to `RewardScorer.from_pretrained` (device, dtype, attention, ...); `max_pairs`
    rows of the data are read. Returns `metrics.EvalResult.as_dict()`, `num_dropped`, `model`,
    `model_version`, `data` and `seconds`.

    Comparisons that cannot be scored (over-long, say) or compare equal things are dropped and
    counted. `over_long` and `deduplicate` are those of a training's data and need the token ids,
    so a directory. Raises ValueError for data, a model or a service that cannot be used.
    """
    began = time.perf_counter()
    given = {name: getattr(columns, name) for name in Columns.model_fields} if columns else {}
    source = Source.model_validate(given)
    if is_url(model_or_url):
        _check_no_loading(model_or_url, loading)
        if over_long != "drop" or deduplicate:
            raise ValueError(
                f"{model_or_url} is a service, whose token ids are not known here: over_long "
                "truncate_left and deduplicate need the model's directory"
            )
        rows = read_rows(data, source, max_pairs)
        comparisons, raw_scores, num_dropped, version = _of_service(model_or_url, data, rows)
    else:
        check_source(data, "DATA")  # told before a large model is loaded
        comparisons, raw_scores, num_dropped, version = _of_directory(
            Path(model_or_url),
            {data: source},
            loading,
            max_rows=max_pairs,
            over_long=over_long,
            deduplicate=deduplicate,
        )
    return {
        **metrics.evaluate(comparisons, raw_scores).as_dict(),
        "num_dropped": num_dropped,
        "model": model_or_url,
        "model_version": version,
        "data": data,
        "seconds": round(time.perf_counter() - began, 3),
    }


def is_url(model_or_url: str) -> bool:
    return model_or_url.startswith(("http://", "https://"))


@contextmanager
def scoring(model_or_url: str, **loading: Any) -> Iterator[ScoreGroups]:
    """What scores groups: a directory's `RewardScorer`, loaded with `loading`, or a service.

    Raises ValueError for a service that is given `loading` or changes its model between two
    requests.
    """
    if not is_url(model_or_url):
        from reward_actor.scorer import RewardScorer

        yield RewardScorer.from_pretrained(Path(model_or_url), **loading).score
        return
    _check_no_loading(model_or_url, loading)
    from reward_actor.client.sync import RewardClient

    with RewardClient(model_or_url) as client:

        def score(groups: Sequence[Group]) -> list[GroupScores]:
            scores = [s for part in _parts(groups) for s in client.score_groups(part)]
            versions = sorted({score.model_version for score in scores})
            if len(versions) > 1:
                raise ValueError(
                    f"{model_or_url} answered with {len(versions)} model versions: {versions}"
                )
            return scores

        yield score


def _check_no_loading(url: str, loading: Mapping[str, Any]) -> None:
    if loading:
        raise ValueError(
            f"{url} is a service, which has loaded its model already: {', '.join(loading)} cannot "
            "be chosen here"
        )


def _of_directory(
    directory: Path, sources: dict[str, Source], loading: Mapping[str, Any], **choice: Any
) -> _Evaluated:
    """`choice` goes to `load_comparisons`."""
    from reward_actor.scorer import RewardScorer

    scorer = RewardScorer.from_pretrained(directory, **loading)
    loaded = load_comparisons(sources, scorer.renderer, **choice)
    comparisons = loaded.comparisons
    sequences = [comparisons.sequence(i) for i in range(comparisons.num_sequences)]
    (scores,) = scorer.score([Group(prompt_ids=[], completion_ids=sequences)])
    for error in filter(None, scores.errors):
        raise ValueError(f"{directory} cannot score {error.type}: {error.message}")
    raw_scores = np.array(scores.raw_scores, dtype=np.float64)
    return comparisons, raw_scores, loaded.dropped.count, scorer.model_version


def _of_service(url: str, data: str, rows: Sequence[Row]) -> _Evaluated:
    from reward_actor.client.sync import RewardClient

    with RewardClient(url) as client:
        if client.info().format == "chat":
            rows = _as_chat(rows, data)
    usable = [row for row in rows if _compares(row)]
    groups = [group for row in usable for group in _groups(row)]
    with scoring(url) as score:
        scores = score(groups)
    samples = iter(
        [s for result in scores for s in zip(result.raw_scores, result.num_tokens, strict=True)]
    )
    items: list[Comparison] = []
    raw_scores: list[float] = []
    for row in usable:
        found = list(islice(samples, len(row.scores)))
        scored = [score for score, _ in found if score is not None]
        if len(scored) == len(found):
            raw_scores += scored
            # Which ids they were is the service's knowledge; how many is in its reply.
            ids = [range(num_tokens) for _, num_tokens in found]
            items.append(Comparison(ids, row.scores, row.key, row=row.number, subset=row.subset))
    version = scores[0].model_version if scores else ""
    return Comparisons.of(items, [data]), np.array(raw_scores), len(rows) - len(items), version


def _as_chat(rows: Sequence[Row], data: str) -> list[Row]:
    """Raises ValueError for all rows that a chat contract cannot read, at once."""
    bad, read = BadRows(data), []
    for row in rows:
        try:
            read.append(as_chat(row))
        except ValueError as error:
            bad.add(row.number, str(error))
    bad.check(len(rows))
    return read


def _compares(row: Row) -> bool:
    things: Sequence[Any] = row.ids or row.sides
    return any(thing != things[0] for thing in things)


def _groups(row: Row) -> list[Group]:
    """The row's completions in their order, those of one prompt in one group."""
    if row.ids:
        return [Group(prompt_ids=[], completion_ids=row.ids)]
    return [
        Group(
            prompt,
            [side.completion for side in sides],
            template_args=row.template_args,
            tools=row.tools,
        )
        for prompt, sides in groupby(row.sides, key=lambda side: side.prompt)
    ]


def _parts(groups: Sequence[Group]) -> Iterator[list[Group]]:
    """The groups in their order, a call's worth at a time."""
    part: list[Group] = []
    size = 0
    for group in groups:
        part.append(group)
        size += _num_tokens(group)
        if size >= _TOKENS_PER_CALL:
            yield part
            part, size = [], 0
    if part:
        yield part


def _num_tokens(group: Group) -> int:
    """Of all its samples, roughly: four characters are a token."""
    return group.num_ids + group.num_characters // 4
