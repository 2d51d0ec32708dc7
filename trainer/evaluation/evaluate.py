"""Evaluation of a reward model on preferences: of an exported directory, or of a running service.

Both ways read the same rows and end in the same `trainer.evaluation.metrics`; only who renders and
scores differs.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from reward_actor.groups import Group, GroupScores
from reward_actor.sources import check_source
from trainer.config.data import Columns, Source
from trainer.data.comparisons import Comparison, Comparisons
from trainer.data.load import check_columns, load_comparisons, read_rows
from trainer.data.render import Tally
from trainer.data.rows import BadRows, Row, as_chat
from trainer.data.split import few_prompts, without_scores
from trainer.evaluation import metrics

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class _Evaluated:
    comparisons: Comparisons
    raw_scores: NDArray[np.float64]
    """(S,) of their sequences."""
    rewards: NDArray[np.float64]
    num_dropped: int
    model_version: str
    warnings: list[str]


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
    `model_version`, `data`, `warnings` and `seconds`.

    Comparisons that cannot be scored (over-long, say) or compare equal things are dropped and
    counted. `over_long` and `deduplicate` are those of a training's data and need the token ids,
    so a directory. Raises ValueError for data, a model or a service that cannot be used.
    """
    began = time.perf_counter()
    source = columns_of(columns)
    check_source(data, "DATA")  # told before a large model is loaded
    check_columns([data], source.named, max_pairs)
    if is_url(model_or_url):
        check_no_loading(model_or_url, loading)
        if over_long != "drop" or deduplicate:
            raise ValueError(
                f"{model_or_url} is a service, whose token ids are not known here: over_long "
                "truncate_left and deduplicate need the model's directory"
            )
        rows = read_rows(data, source, max_pairs)
        found = _of_service(model_or_url, data, rows)
    else:
        found = _of_directory(
            Path(model_or_url),
            data,
            source,
            loading,
            max_rows=max_pairs,
            over_long=over_long,
            deduplicate=deduplicate,
        )
    return {
        **metrics.evaluate(found.comparisons, found.raw_scores, found.rewards).as_dict(),
        "num_dropped": found.num_dropped,
        "model": model_or_url,
        "model_version": found.model_version,
        "data": data,
        "warnings": found.warnings + few_prompts(found.comparisons),
        "seconds": round(time.perf_counter() - began, 3),
    }


def columns_of(columns: Columns | None) -> Source:
    """A data set with these columns, or the default ones."""
    return Source.model_validate({} if columns is None else columns.model_dump())


def is_url(model_or_url: str) -> bool:
    return model_or_url.startswith(("http://", "https://"))


@dataclass(frozen=True)
class ScoringModel:
    """A directory's scorer, or a service."""

    score: Callable[[Sequence[Group]], list[GroupScores]]
    format: Literal["chat", "text"]


@contextmanager
def scoring(model_or_url: str, **loading: Any) -> Iterator[ScoringModel]:
    """What scores groups: a directory's `RewardScorer`, loaded with `loading`, or a service.

    Raises ValueError for a service that is given `loading` or changes its model between two
    requests.
    """
    if not is_url(model_or_url):
        from reward_actor.scorer import RewardScorer

        scorer = RewardScorer.from_pretrained(Path(model_or_url), **loading)
        yield ScoringModel(scorer.score, scorer.contract.format)
        return
    check_no_loading(model_or_url, loading)
    from reward_actor.client.sync import RewardClient

    with RewardClient(model_or_url) as client:
        client.check_reachable()

        def score(groups: Sequence[Group]) -> list[GroupScores]:
            scores = [s for part in _parts(groups) for s in client.score_groups(part)]
            versions = sorted({score.model_version for score in scores})
            if len(versions) > 1:
                raise ValueError(
                    f"{model_or_url} answered with {len(versions)} model versions: {versions}"
                )
            return scores

        yield ScoringModel(score, client.info().format)


def check_no_loading(url: str, loading: Mapping[str, Any]) -> None:
    """Raise ValueError for `loading` that is given to a service."""
    if loading:
        raise ValueError(
            f"{url} is a service, which has loaded its model already: {', '.join(loading)} cannot "
            "be chosen here"
        )


def _of_directory(
    directory: Path, data: str, source: Source, loading: Mapping[str, Any], **choice: Any
) -> _Evaluated:
    """`choice` goes to `load_comparisons`."""
    from reward_actor.scorer import RewardScorer

    scorer = RewardScorer.from_pretrained(directory, **loading)
    loaded = load_comparisons({data: source}, scorer.renderer, **choice)
    comparisons = loaded.comparisons
    sequences = [comparisons.sequence(i) for i in range(comparisons.num_sequences)]
    (scores,) = scorer.score([Group(prompt_ids=[], completion_ids=sequences)])
    for error in filter(None, scores.errors):
        raise ValueError(f"{directory} cannot score {error.type}: {error.message}")
    raw_scores, rewards = (
        np.array(of, dtype=np.float64) for of in (scores.raw_scores, scores.rewards)
    )
    tally = loaded.tally
    warnings = row_warnings(data, tally)
    version = scorer.model_version
    return _Evaluated(comparisons, raw_scores, rewards, tally.count, version, warnings)


def _of_service(url: str, data: str, rows: Sequence[Row]) -> _Evaluated:
    with scoring(url) as model:
        scored, version, _ = score_rows(model, rows, data)
    return _Evaluated(
        as_comparisons(scored, data),
        np.array([score for one in scored for score in one.raw_scores]),
        np.array([reward for one in scored for reward in one.rewards]),
        len(rows) - len(scored),
        version,
        row_warnings(data, tally_of(rows)),
    )


def tally_of(rows: Sequence[Row]) -> Tally:
    """What `row_warnings` looks at."""
    return Tally(
        num_rows=len(rows),
        num_without_prompt=sum(not row.has_prompt for row in rows),
        num_without_scores=sum(not row.has_scores for row in rows),
    )


def row_warnings(data: str, tally: Tally) -> list[str]:
    """What is guessed of rows, and is to be known to read an accuracy."""
    warnings = without_scores(data, tally)
    if tally.num_without_prompt:
        warnings.append(
            f"{data}: {tally.num_without_prompt} of {tally.num_rows} rows have no prompt of their "
            "own; what their completions begin with alike is taken for it, so that intervals may "
            "be too narrow"
        )
    return warnings


class ScoredRow(NamedTuple):
    row: Row
    raw_scores: list[float]
    """K, in the order of the row's completions, as the two others."""
    rewards: list[float]
    num_tokens: list[int]


def score_rows(
    model: ScoringModel, rows: Sequence[Row], data: str
) -> tuple[list[ScoredRow], str, Counter[str]]:
    """Those of the rows whose completions differ and could all be scored, as the model's format
    reads them, its `model_version`, and how many completions could not be scored, by reason.
    Raises ValueError for rows that it cannot read."""
    if model.format == "chat":
        rows = _as_chat(rows, data)
    usable = [row for row in rows if _compares(row)]
    results = model.score([group for row in usable for group in _groups(row)])
    samples = iter(
        [
            sample
            for result in results
            for sample in zip(result.raw_scores, result.rewards, result.num_tokens, strict=True)
        ]
    )
    scored = []
    for row in usable:
        found = list(islice(samples, len(row.scores)))
        raw_scores = [score for score, _, _ in found if score is not None]
        rewards = [reward for _, reward, _ in found if reward is not None]
        if len(rewards) == len(found):
            scored.append(ScoredRow(row, raw_scores, rewards, [num for _, _, num in found]))
    errors: Counter[str] = Counter(
        error.type for result in results for error in result.errors if error
    )
    return scored, results[0].model_version if results else "", errors


def as_comparisons(scored: Sequence[ScoredRow], data: str) -> Comparisons:
    """Which token ids they were is the model's knowledge; how many, it has told."""
    return Comparisons.of(
        [
            Comparison(
                [range(num) for num in one.num_tokens],
                one.row.scores,
                one.row.key,
                row=one.row.number,
                subset=one.row.subset,
            )
            for one in scored
        ],
        [data],
    )


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
