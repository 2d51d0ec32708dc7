"""Rows to comparisons of token ids, a block of rows at a time: the same in one process and in many.

Shapes: C comparisons of a block.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, field
from hashlib import blake2b, sha256
from operator import add
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from reward_actor.groups import SampleError
from reward_actor.render import Renderer, RenderError, Sample
from reward_actor.token_ids import checked, common_prefix
from trainer.data.comparisons import Comparison, Comparisons
from trainer.data.rows import Row, as_chat

if TYPE_CHECKING:
    from numpy.typing import NDArray

BLOCK_ROWS = 1000

# What is remembered of each comparison when its tokens are away in a file: 16 bytes of a digest of
# what it is about, of all that is learned from it, and of its two sequences in either order (empty
# unless one is preferred); which of them that is; the tokens that all of its sequences begin with.
MARK = np.dtype(
    [("key", "S16"), ("content", "S16"), ("pair", "S16"), ("is_second", "?"), ("shared", "<i4")]
)


@dataclass(frozen=True)
class Rules:
    """What decides, besides the renderer, what a row becomes."""

    attributes: tuple[str, ...] = ()
    over_long: Literal["drop", "truncate_left", "error"] = "drop"
    split_seed: int = 0


@dataclass(frozen=True)
class Dropped:
    """Comparisons that were left out: told, never silent."""

    num_too_long: int = 0
    num_identical: int = 0
    num_unlabelled: int = 0
    num_duplicates: int = 0

    def __str__(self) -> str:
        parts = [f"{self.num_too_long} too long", f"{self.num_identical} with equal sides"]
        if self.num_unlabelled:
            parts.append(f"{self.num_unlabelled} without a label")
        if self.num_duplicates:
            parts.append(f"{self.num_duplicates} used already")
        return ", ".join(parts)

    @property
    def count(self) -> int:
        return self.num_too_long + self.num_identical + self.num_unlabelled + self.num_duplicates


@dataclass(frozen=True)
class Tally(Dropped):
    """And what else is counted of the rows of one source."""

    num_rows: int = 0
    num_truncated: int = 0
    num_prompts_differ: int = 0
    num_double_bos: int = 0
    num_without_prompt: int = 0
    num_without_scores: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(*map(add, astuple(self), astuple(other)))


@dataclass(frozen=True)
class Block:
    """Rows of one source, rendered: what is kept of them, and what is not."""

    comparisons: Comparisons
    marks: NDArray[np.void]
    """(C,) of MARK."""
    tally: Tally
    bad: list[tuple[int, str]] = field(default_factory=list)
    """(line, why) of the rows that cannot be used."""


def render_rows(
    rows: Sequence[Row], renderer: Renderer, rules: Rules, source: int, names: Sequence[str]
) -> Iterator[Block]:
    """All rows of source number `source` of `names`, in blocks of BLOCK_ROWS."""
    for first in range(0, len(rows), BLOCK_ROWS):
        yield render_block(rows[first : first + BLOCK_ROWS], renderer, rules, source, names)


def render_block(
    rows: Sequence[Row], renderer: Renderer, rules: Rules, source: int, names: Sequence[str]
) -> Block:
    """The rows' comparisons without those of equal sides and the over-long ones, counted."""
    counts, bad = Counter(num_rows=len(rows)), []
    kept: list[Comparison] = []
    for row, rendered in _render(rows, renderer):
        counts["num_prompts_differ"] += row.prompts_differ
        attributes = _targets(row, rules.attributes)
        counts["num_without_prompt"] += not row.has_prompt
        counts["num_without_scores"] += not row.has_scores
        try:
            sequences = _fitted(rendered, renderer, rules.over_long, counts)
        except RenderError as error:
            bad.append((row.number, str(error)))
            continue
        if sequences is None:
            counts["num_too_long"] += 1
        elif len(sequences) == 1 and not attributes:
            counts["num_unlabelled"] += 1
        elif len(sequences) > 1 and all(ids == sequences[0] for ids in sequences):
            counts["num_identical"] += 1
        else:
            bos = renderer.contract.bos_token_id
            counts["num_double_bos"] += bos is not None and any(
                ids[:2] == [bos, bos] for ids in sequences
            )
            kept.append(
                Comparison(
                    sequences=sequences,
                    scores=row.scores,
                    key=row.key,
                    margin=row.margin,
                    attributes=attributes,
                    row=row.number,
                    source=source,
                    subset=row.subset,
                )
            )
    marks = np.array([_mark(item, rules.split_seed) for item in kept], dtype=MARK)
    return Block(Comparisons.of(kept, names, len(rules.attributes)), marks, Tally(**counts), bad)


def _render(
    rows: Sequence[Row], renderer: Renderer
) -> Iterator[tuple[Row, list[list[int] | RenderError]]]:
    """Each row as the contract reads it, and its sequences, all texts of the block in one go."""
    read = [_read(row, renderer) for row in rows]
    samples = [
        Sample(side.prompt, side.completion, row.tools, row.template_args)
        for row in read
        if isinstance(row, Row)
        for side in row.sides
    ]
    rendered = iter(renderer.render_many(samples))
    for row, found in zip(rows, read, strict=True):
        if isinstance(found, RenderError):
            yield row, [found]
        else:
            yield found, [list(ids) for ids in found.ids] or [next(rendered) for _ in found.sides]


def _read(row: Row, renderer: Renderer) -> Row | RenderError:
    if renderer.contract.format == "text":
        return row
    try:
        return as_chat(row)
    except ValueError as error:
        return RenderError(str(error))


def _fitted(
    rendered: Sequence[list[int] | RenderError],
    renderer: Renderer,
    over_long: str,
    counts: Counter[str],
) -> list[list[int]] | None:
    """Sequences that the contract allows, or None if one is too long. Raises RenderError."""
    for ids in rendered:
        if isinstance(ids, RenderError):
            raise ids
    sequences = [ids for ids in rendered if isinstance(ids, list)]
    limit = renderer.contract.max_length
    is_long = max(map(len, sequences)) > limit
    if is_long and over_long == "truncate_left":
        counts["num_truncated"] += 1
        sequences = truncate_left(sequences, limit, renderer.contract.bos_token_id)
    for ids in sequences:
        found = checked(ids, renderer.contract)
        if isinstance(found, SampleError):
            if found.type == "too_long" and over_long == "drop":
                continue
            raise RenderError(found.message)
    return None if is_long and over_long == "drop" else sequences


def truncate_left(
    sequences: Sequence[list[int]], max_length: int, bos_token_id: int | None
) -> list[list[int]]:
    """The ends of the sequences of one comparison, at most `max_length` tokens of each.

    First all lose the same number of tokens of what they share, so that they still see the same
    prompt; then each that is still too long loses more. A BOS that they begin with stays.
    """
    keep = int(bos_token_id is not None and all(ids[:1] == [bos_token_id] for ids in sequences))
    excess, left = max(map(len, sequences)) - max_length, min(map(len, sequences)) - keep - 1
    cut = max(0, min(excess, common_prefix(*sequences) - keep, left))  # something is left of each
    shorter = [ids[:keep] + ids[keep + cut :] for ids in sequences]
    return [
        ids if len(ids) <= max_length else ids[:keep] + ids[len(ids) - (max_length - keep) :]
        for ids in shorter
    ]


def _targets(row: Row, names: Sequence[str]) -> list[list[float]]:
    """The attributes that are asked for, NaN where unknown; empty if none of them is known."""
    targets = [[known.get(name, math.nan) for name in names] for known in row.attributes]
    return targets if any(value == value for some in targets for value in some) else []


def _mark(item: Comparison, split_seed: int) -> tuple[bytes, bytes, bytes, bool, int]:
    tokens = [np.array(ids, dtype=np.int32).tobytes() for ids in item.sequences]
    labels: list[Any] = [list(map(len, tokens)), item.scores, item.margin, item.attributes]
    # As float32, in which they are learned from; repr of NaN is the same for all of them.
    content = b"".join([*tokens, repr(_rounded(labels)).encode()])
    is_pair = len(tokens) == 2 and item.scores[0] > item.scores[1]
    either = b"".join(_digest(ids) for ids in sorted(tokens)) if is_pair else b""
    return (
        hash_key(item.key, split_seed),
        _digest(content),
        _digest(either) if is_pair else b"",
        is_pair and tokens[0] > tokens[1],
        common_prefix(*tokens) // 4,
    )


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(np.float32(value))
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value


def hash_key(key: str, split_seed: int) -> bytes:
    """16 bytes that stand for what a comparison is about; the smallest ones are held out."""
    return sha256(f"{split_seed}:{key}".encode("utf-8", "surrogatepass")).digest()[:16]


def _digest(data: bytes) -> bytes:
    return blake2b(data, digest_size=16).digest()
