"""Preference data sets: read, checked and rendered. The one door for training and evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Literal

from reward_actor.config_errors import did_you_mean
from reward_actor.sources import raw_rows
from trainer.config.data import Source
from trainer.data.comparisons import Comparisons
from trainer.data.gather import Gathered, first_uses, gather, take
from trainer.data.parse import parse_line, parse_object
from trainer.data.render import Rules, Tally, render_rows
from trainer.data.rows import BadRows, Row

if TYPE_CHECKING:
    from reward_actor.render import Renderer


@dataclass(frozen=True)
class Loaded:
    """Data sets as token ids, and what was counted of their rows."""

    comparisons: Comparisons
    tally: Tally
    """`.count` were dropped in all, and `str()` for people: "1 too long, 0 with equal sides"."""


def read_rows(source_name: str, source: Source, max_rows: int | None = None) -> list[Row]:
    """The rows of a file, a directory or glob of files, or a hub data set NAME[:SPLIT].

    Relative paths start at the working directory. `trainer.data.parse.parse_row` shows what a row
    may be; `source` names its columns. Raises ValueError for a source that cannot be read, one
    without rows, and rows without what is needed, all of them at once.
    """
    return list(iterate_rows(source_name, source, max_rows))


def iterate_rows(source_name: str, source: Source, max_rows: int | None = None) -> Iterator[Row]:
    """The same one by one, in constant memory; what is wrong is raised after the last row."""
    bad = BadRows(source_name)
    num_rows = 0
    for number, raw in raw_rows(source_name):
        if num_rows == max_rows:
            break
        num_rows += 1
        try:
            row = parse_line(number, raw, source)
        except ValueError as error:
            bad.add(number, str(error))
        else:
            yield row
    bad.check(num_rows)
    if not num_rows:
        raise ValueError(f"{source_name} holds no rows")


def check_columns(
    source_names: Sequence[str], named: Mapping[str, str], max_rows: int | None = None
) -> None:
    """Raise ValueError for a column, by its setting (`Columns.named`), that no row of these data
    sets has: it would be ignored without a word. Reads until all have been seen."""
    missing, seen = dict(named), dict[str, None]()
    for name in source_names:
        for _, raw in islice(raw_rows(name), max_rows):
            if not missing:
                return
            try:
                row = parse_object(raw)
            except ValueError:
                continue  # reading the rows tells which it is
            missing = {key: column for key, column in missing.items() if column not in row}
            seen |= dict.fromkeys(row)
    for setting, column in missing.items():
        raise ValueError(
            f"{setting}: no row of {', '.join(source_names)} has a column {column!r}"
            + did_you_mean(column, list(seen))
        )


def choose_format(
    wanted: Literal["auto", "chat", "text"], rows: Iterable[Row], has_chat_template: bool
) -> Literal["chat", "text"]:
    """Under "auto": chat if the tokenizer has a template, unless the rows are dialogues in text."""
    if wanted != "auto":
        return wanted
    return "chat" if has_chat_template and not all(row.is_dialogue for row in rows) else "text"


def explain_format(
    wanted: Literal["auto", "chat", "text"],
    chosen: Literal["chat", "text"],
    has_chat_template: bool,
) -> str:
    """What `choose_format` has chosen, and why."""
    if wanted != "auto":
        return f"{chosen}: model.format says so"
    if chosen == "chat":
        return "chat: the tokenizer has a chat template"
    why = (
        "they are dialogues in text" if has_chat_template else "the tokenizer has no chat template"
    )
    return f"text: {why}"


def load_comparisons(
    sources: Mapping[str, Source],
    renderer: Renderer,
    *,
    over_long: Literal["drop", "truncate_left"] = "drop",
    max_rows: int | None = None,
    deduplicate: bool = False,
) -> Loaded:
    """What an evaluation compares: of all sources, in their order, as `renderer` renders it.

    Comparisons of equal sides, over-long ones under "drop", and single completions are left out and
    counted; with `deduplicate`, of equal ones in a subset, all but the first. `max_rows` are read
    of each source. Raises ValueError for sources and rows that cannot be used.
    """
    loaded = {name: read_rows(name, source, max_rows) for name, source in sources.items()}
    gathered = gather_rows(loaded, renderer, Rules(over_long=over_long))
    comparisons = gathered.comparisons
    if deduplicate:
        comparisons = take(comparisons, first_uses(gathered, by_subset=True))
    total = sum(gathered.tallies, Tally())
    return Loaded(comparisons, total)


def gather_rows(rows: Mapping[str, Sequence[Row]], renderer: Renderer, rules: Rules) -> Gathered:
    """The rows of each source by its name, rendered. Raises ValueError as `gather` does."""
    names = list(rows)
    blocks = (
        (number, block)
        for number, name in enumerate(names)
        for block in render_rows(rows[name], renderer, rules, number, names)
    )
    return gather(blocks, names, renderer.contract.max_length)
