"""Rendered pairs as flat arrays, and what was left out on the way.

Shapes: P pairs, 2P sequences (2i is the chosen side of pair i, 2i + 1 the rejected one), N tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

from reward_actor.groups import SampleError
from reward_actor.render import Renderer, RenderError
from trainer.data import BadRows, Row

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class PairSet:
    """P pairs as token ids. Arrays only: Ray's object store shares them without a copy."""

    ids: NDArray[np.int32]  # (N,)
    offsets: NDArray[np.int64]  # (2P + 1,)
    margins: NDArray[np.float32]  # (P,)
    rows: NDArray[np.int32]  # (P,) the line in the file that each pair comes from

    @classmethod
    def of(cls, pairs: Sequence[RenderedPair]) -> PairSet:
        sequences = [ids for pair in pairs for ids in (pair.chosen, pair.rejected)]
        return cls(
            ids=np.array([i for ids in sequences for i in ids], dtype=np.int32),
            offsets=np.cumsum([0, *map(len, sequences)], dtype=np.int64),
            margins=np.array([pair.row.margin for pair in pairs], dtype=np.float32),
            rows=np.array([pair.row.number for pair in pairs], dtype=np.int32),
        )

    def __len__(self) -> int:
        return len(self.margins)

    def chosen(self, pair: int) -> list[int]:
        return self._sequence(2 * pair)

    def rejected(self, pair: int) -> list[int]:
        return self._sequence(2 * pair + 1)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(P,) tokens of the longer side."""
        longest: NDArray[np.int64] = np.diff(self.offsets).reshape(-1, 2).max(axis=1)
        return longest

    def num_tokens(self, pairs: Sequence[int]) -> int:
        return sum(int(self.offsets[2 * i + 2] - self.offsets[2 * i]) for i in pairs)

    def digest(self) -> str:
        """sha256 of everything that training sees of these pairs."""
        sha = hashlib.sha256()
        for array in (self.ids, self.offsets, self.margins):
            sha.update(np.ascontiguousarray(array).tobytes())
        return sha.hexdigest()

    def _sequence(self, index: int) -> list[int]:
        ids: list[int] = self.ids[self.offsets[index] : self.offsets[index + 1]].tolist()
        return ids


@dataclass(frozen=True)
class RenderedPair:
    row: Row
    chosen: list[int]
    rejected: list[int]


@dataclass
class Dropped:
    """Pairs that were left out: told, never silent."""

    num_identical: int = 0
    num_too_long: int = 0

    def __str__(self) -> str:
        return f"{self.num_too_long} too long, {self.num_identical} with equal sides"

    @property
    def count(self) -> int:
        return self.num_identical + self.num_too_long


@dataclass
class Prepared:
    """The data of a training and how it came about."""

    train: PairSet
    heldout: PairSet
    num_rows: int
    dropped: Dropped = field(default_factory=Dropped)

    def report(self, max_length: int) -> list[str]:
        """Lines for people: how many pairs, what was left out, how long the pairs are."""
        short, middle, long_ = np.percentile(self.train.lengths, (5, 50, 95)).astype(int)
        return [
            f"{len(self.train)} training pairs, {len(self.heldout)} held out by prompt, "
            f"of {self.num_rows} rows; dropped: {self.dropped}",
            f"tokens of the longer side: 5 % {short}, median {middle}, 95 % {long_}, "
            f"longest {self.train.lengths.max()}, limit {max_length}",
        ]


def choose_format(
    wanted: Literal["auto", "chat", "text"], rows: Sequence[Row], has_chat_template: bool
) -> Literal["chat", "text"]:
    """Under "auto": chat if the tokenizer has a template, unless the rows are dialogues in text."""
    if wanted != "auto":
        return wanted
    in_text = all(row.is_dialogue for row in rows)
    return "chat" if has_chat_template and not in_text else "text"


def render_rows(
    rows: Iterable[Row], renderer: Renderer, source: str
) -> tuple[list[RenderedPair], Dropped]:
    """Both sides of every row as token ids, without equal sides and over-long pairs, counted.

    Raises ValueError for rows that cannot be rendered under the renderer's contract, and if no
    pair is left.
    """
    bad = BadRows(source)
    dropped = Dropped()
    pairs: list[RenderedPair] = []
    num_rows = 0
    for row in rows:
        num_rows += 1
        if row.is_dialogue and renderer.contract.format == "chat":
            bad.add(row.number, "a whole dialogue as text cannot be framed; use model.format text")
            continue
        try:
            chosen, rejected = (
                renderer.checked(renderer.render(side.prompt, side.completion))
                for side in (row.chosen, row.rejected)
            )
        except RenderError as error:
            bad.add(row.number, str(error))
            continue
        if isinstance(chosen, SampleError) or isinstance(rejected, SampleError):
            error_ = chosen if isinstance(chosen, SampleError) else rejected
            assert isinstance(error_, SampleError)
            if error_.type == "too_long":
                dropped.num_too_long += 1
            else:
                bad.add(row.number, error_.message)
        elif chosen == rejected:
            dropped.num_identical += 1
        else:
            pairs.append(RenderedPair(row, chosen, rejected))
    bad.check(num_rows)
    if not pairs:
        raise ValueError(
            f"no pair of {source} is left to use: of {num_rows} rows, {dropped} "
            f"(max_length is {renderer.contract.max_length})"
        )
    return pairs, dropped


def split_by_prompt(
    pairs: Sequence[RenderedPair], fraction: float, seed: int
) -> tuple[list[RenderedPair], list[RenderedPair]]:
    """Train and held-out pairs; all pairs about one prompt land on the same side.

    Which prompts are held out depends on the prompts and the seed, not on the order of the rows;
    at least one is, if `fraction` is above 0. Raises ValueError if nothing would be left to train.
    """
    if fraction == 0:
        return list(pairs), []
    keys = sorted({pair.row.key for pair in pairs}, key=lambda key: _hash(key, seed))
    num_heldout = max(1, round(fraction * len(keys)))
    if num_heldout >= len(keys):
        raise ValueError(
            f"data.eval_fraction is {fraction}: of {len(keys)} different prompts, {num_heldout} "
            "would be held out and none left to train; add data or set it to 0"
        )
    heldout = set(keys[:num_heldout])
    return (
        [pair for pair in pairs if pair.row.key not in heldout],
        [pair for pair in pairs if pair.row.key in heldout],
    )


def _hash(key: str, seed: int) -> str:
    return hashlib.sha256(f"{seed}:{key}".encode("utf-8", "surrogatepass")).hexdigest()
