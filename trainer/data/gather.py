"""Blocks of rendered rows to one set of comparisons, in memory or in files.

Shapes: C comparisons, S sequences, N tokens.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.data.comparisons import Comparisons
from trainer.data.render import Block, Tally
from trainer.data.rows import BadRows

if TYPE_CHECKING:
    from numpy.typing import NDArray

IDS_FILE = "ids.npy"


@dataclass(frozen=True)
class Gathered:
    """All comparisons of some sources, in the order of the rows."""

    comparisons: Comparisons
    marks: NDArray[np.void]
    """(C,) of `trainer.data.render.MARK`."""
    tallies: list[Tally]
    """One for each source."""


def gather(
    blocks: Iterable[tuple[int, Block]],
    names: Sequence[str],
    max_length: int,
    ids_file: Path | None = None,
) -> Gathered:
    """Put blocks, each with the number of its source, together; tokens go to `ids_file` if given.

    Raises ValueError for rows that cannot be used, at the first block that has some, and for a
    source of which nothing is left; one without any label is let through beside others.
    """
    tallies = [Tally() for _ in names]
    bad = [BadRows(name) for name in names]
    parts: dict[str, list[NDArray[Any]]] = defaultdict(list)
    subsets: dict[str, int] = {}
    file = None if ids_file is None else ids_file.open("wb")
    try:
        for source, block in blocks:
            tallies[source] += block.tally
            for number, why in block.bad:
                bad[source].add(number, why)
            bad[source].check(tallies[source].num_rows)
            some = block.comparisons
            if file is None:
                parts["ids"].append(some.ids)
            else:
                file.write(some.ids.tobytes())
            renumbered = [subsets.setdefault(name, len(subsets)) for name in some.subset_names]
            parts["subsets"].append(np.array(renumbered, dtype=np.int32)[some.subsets])
            parts["lengths"].append(some.lengths)
            parts["counts"].append(np.diff(some.starts))
            parts["marks"].append(block.marks)
            for name in ("scores", "margins", "attributes", "prompts", "rows", "sources"):
                parts[name].append(getattr(some, name))
    finally:
        if file is not None:
            file.close()
    for name, tally in zip(names, tallies, strict=True):
        if not tally.num_rows:
            raise ValueError(f"{name} holds no rows")
    whole = {name: np.concatenate(arrays) for name, arrays in parts.items()}
    for number, (name, tally) in enumerate(zip(names, tallies, strict=True)):
        is_unlabelled = tally.num_unlabelled == tally.num_rows
        if is_unlabelled and len(whole["sources"]):
            continue  # `trainer.data.split` warns of it
        if not (whole["sources"] == number).any():
            raise ValueError(
                f"no pair of {name} is left to use: of {tally.num_rows} rows, {tally} "
                f"(max_length is {max_length})"
            )
    if ids_file is not None:
        whole["ids"] = np.memmap(ids_file, dtype=np.int32, mode="r")
    in_order = sorted(subsets)
    place = np.array([in_order.index(name) for name in subsets], dtype=np.int32)
    comparisons = Comparisons(
        ids=whole["ids"],
        offsets=_ends(whole["lengths"]),
        starts=_ends(whole["counts"]),
        scores=whole["scores"],
        margins=whole["margins"],
        attributes=whole["attributes"],
        prompts=whole["prompts"],
        rows=whole["rows"],
        sources=whole["sources"],
        subsets=place[whole["subsets"]],
        source_names=tuple(names),
        subset_names=tuple(in_order),
    )
    return Gathered(comparisons, whole["marks"], tallies)


def take(
    comparisons: Comparisons, index: NDArray[np.int64], directory: Path | None = None
) -> Comparisons:
    """Those of `index`, which must rise; written to `directory`, if given, for `Comparisons.open`.

    Then no more than a mapping of the tokens is in memory.
    """
    counts = np.diff(comparisons.starts)[index]
    chosen = np.zeros(len(comparisons), dtype=bool)
    chosen[index] = True
    sequences = np.repeat(chosen, np.diff(comparisons.starts))
    lengths = comparisons.lengths[sequences]
    num_tokens = int(lengths.sum())
    if directory is None:
        ids = np.empty(num_tokens, dtype=np.int32)
    else:
        directory.mkdir(parents=True)
        ids = np.lib.format.open_memmap(
            directory / IDS_FILE, mode="w+", dtype=np.int32, shape=(num_tokens,)
        )
    token_ends, end = comparisons.offsets[comparisons.starts], 0
    for run in np.split(index, np.flatnonzero(np.diff(index) != 1) + 1) if len(index) else []:
        piece = comparisons.ids[token_ends[run[0]] : token_ends[run[-1] + 1]]
        ids[end : end + len(piece)] = piece
        end += len(piece)
    taken = Comparisons(
        ids=ids,
        offsets=_ends(lengths),
        starts=_ends(counts),
        scores=comparisons.scores[sequences],
        margins=comparisons.margins[index],
        attributes=comparisons.attributes[sequences],
        prompts=comparisons.prompts[index],
        rows=comparisons.rows[index],
        sources=comparisons.sources[index],
        subsets=comparisons.subsets[index],
        source_names=comparisons.source_names,
        subset_names=comparisons.subset_names,
    )
    if directory is not None:
        assert isinstance(ids, np.memmap)
        ids.flush()
        for item in fields(taken):
            if item.name not in ("ids", "directory"):
                np.save(directory / f"{item.name}.npy", np.asarray(getattr(taken, item.name)))
    return taken


def first_uses(gathered: Gathered, *, by_subset: bool = False) -> NDArray[np.int64]:
    """The comparisons without those that repeat an earlier one, which are counted as dropped.

    With `by_subset`, for evaluations, which show each by itself, a subset repeats only its own.
    """
    content = gathered.marks["content"]
    if by_subset:
        content = np.rec.fromarrays([content, gathered.comparisons.subsets])
    _, first = np.unique(content, return_index=True)
    first = np.sort(first).astype(np.int64)
    repeated = np.ones(len(gathered.marks), dtype=bool)
    repeated[first] = False
    sources = gathered.comparisons.sources[repeated]
    more = np.bincount(sources, minlength=len(gathered.tallies)).tolist()
    gathered.tallies[:] = [
        tally + Tally(num_duplicates=num) for tally, num in zip(gathered.tallies, more, strict=True)
    ]
    return first


def num_contradictions(marks: NDArray[np.void]) -> int:
    """How many pairs of sequences stand there both ways round."""
    pairs = marks[marks["pair"] != b""]
    return len(
        np.intersect1d(pairs["pair"][pairs["is_second"]], pairs["pair"][~pairs["is_second"]])
    )


def _ends(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths, dtype=np.int64)])
