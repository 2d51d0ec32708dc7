"""What a reward model learns from, as flat arrays of token ids. NumPy only.

A comparison is one prompt with K completions and what is known about them: a pair (K = 2, chosen
and rejected), a ranking (K > 2), or a completion with attributes (K = 1).
Shapes: C comparisons, S sequences, N tokens, A attributes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Comparison:
    """One comparison before it is laid flat. `scores` order its sequences, best first; those of a
    pair are (1, 0), and equal ones are a tie."""

    sequences: Sequence[Sequence[int]]
    scores: Sequence[float]
    key: str
    """What it is about: comparisons of one key are never on both sides of a held-out split."""
    margin: float = 0.0
    attributes: Sequence[Sequence[float]] = ()
    """For each sequence its A numbers, NaN where unknown; empty if no row has any."""
    row: int = 0
    source: int = 0
    subset: str = ""


@dataclass(frozen=True)
class Comparisons:
    """C comparisons. Arrays only: Ray's object store shares them without a copy."""

    ids: NDArray[np.int32]
    """(N,) token ids of all sequences, one after another."""
    offsets: NDArray[np.int64]
    """(S + 1,) where each sequence begins in `ids`."""
    starts: NDArray[np.int64]
    """(C + 1,) the first sequence of each comparison; its best one."""
    scores: NDArray[np.float32]
    """(S,) the order within a comparison, higher is better, never rising; equal for a tie."""
    margins: NDArray[np.float32]
    """(C,) by how much chosen is better, as the annotator said; 0 where nothing was said."""
    attributes: NDArray[np.float32]
    """(S, A) targets of the regression heads, NaN where unknown."""
    prompts: NDArray[np.int64]
    """(C,) what it is about: a number made of its key."""
    rows: NDArray[np.int64]
    """(C,) the line (from 1) in its data set."""
    sources: NDArray[np.int32]
    """(C,) index into `source_names`."""
    subsets: NDArray[np.int32]
    """(C,) index into `subset_names`."""
    source_names: tuple[str, ...] = field(default=())
    subset_names: tuple[str, ...] = field(default=())
    directory: Path | None = None
    """Where it was opened. Such a set is pickled as this path, not with its tokens."""

    @classmethod
    def of(
        cls, comparisons: Iterable[Comparison], source_names: Sequence[str], num_attributes: int = 0
    ) -> Comparisons:
        items = list(comparisons)
        sequences = [ids for item in items for ids in item.sequences]
        unknown = [float("nan")] * num_attributes
        attributes = [
            row for item in items for row in (item.attributes or [unknown] * len(item.sequences))
        ]
        subset_names = sorted({item.subset for item in items})
        number = {name: index for index, name in enumerate(subset_names)}
        return cls(
            ids=np.array([i for ids in sequences for i in ids], dtype=np.int32),
            offsets=np.cumsum([0, *map(len, sequences)], dtype=np.int64),
            starts=np.cumsum([0, *(len(item.sequences) for item in items)], dtype=np.int64),
            scores=np.array([s for item in items for s in item.scores], dtype=np.float32),
            margins=np.array([item.margin for item in items], dtype=np.float32),
            attributes=np.array(attributes, dtype=np.float32).reshape(
                len(sequences), num_attributes
            ),
            prompts=np.array([_number(item.key) for item in items], dtype=np.int64),
            rows=np.array([item.row for item in items], dtype=np.int64),
            sources=np.array([item.source for item in items], dtype=np.int32),
            subsets=np.array([number[item.subset] for item in items], dtype=np.int32),
            source_names=tuple(source_names),
            subset_names=tuple(subset_names),
        )

    def __len__(self) -> int:
        return len(self.margins)

    @property
    def num_sequences(self) -> int:
        return len(self.offsets) - 1

    def sequences(self, comparison: int) -> list[list[int]]:
        """The token ids of one comparison's sequences, best first."""
        return [self.sequence(i) for i in range(*self.starts[comparison : comparison + 2])]

    def sequence(self, index: int) -> list[int]:
        ids: list[int] = self.ids[self.offsets[index] : self.offsets[index + 1]].tolist()
        return ids

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(S,) tokens of each sequence."""
        return np.diff(self.offsets)

    def longest_of(self, comparisons: Sequence[int]) -> list[int]:
        """Tokens of the longest sequence of each of these comparisons."""
        spans = (self.offsets[self.starts[i] : self.starts[i + 1] + 1] for i in comparisons)
        return [int(np.diff(span).max()) for span in spans]

    def num_tokens(self, comparisons: Sequence[int]) -> int:
        """Tokens of these comparisons' sequences, shared prefixes counted for each."""
        those = np.asarray(comparisons, dtype=np.int64)
        first, last = self.starts[those], self.starts[those + 1]
        return int((self.offsets[last] - self.offsets[first]).sum())

    def where(self, comparison: int) -> str:
        """Which row of which data set it is, for messages."""
        return f"{self.source_names[self.sources[comparison]]}:{self.rows[comparison]}"

    @property
    def is_decided(self) -> NDArray[np.bool_]:
        """(C,) whether any of its sequences is better than another one: whether it has a pair."""
        return self.scores[self.starts[:-1]] > self.scores[self.starts[1:] - 1]

    def counts(self) -> dict[str, int]:
        """How many comparisons of each kind there are, and how many have a margin."""
        sizes, first = np.diff(self.starts), self.starts[:-1]
        first = first[sizes == 2]
        num_ties = int((self.scores[first] == self.scores[first + 1]).sum())
        return {
            "pairs": len(first) - num_ties,
            "ties": num_ties,
            "rankings": int((sizes > 2).sum()),
            "single completions": int((sizes == 1).sum()),
            "margins": int(np.count_nonzero(self.margins)),
        }

    def digest(self) -> str:
        """sha256 of everything that training sees of them."""
        sha = hashlib.sha256()
        for name in ("ids", "offsets", "starts", "scores", "margins", "attributes"):
            sha.update(np.ascontiguousarray(getattr(self, name)).data)
        return sha.hexdigest()

    @classmethod
    def open(cls, directory: Path) -> Comparisons:
        """What `gather.take` wrote, its tokens mapped from the file, not read: for sets larger than
        memory."""
        values: dict[str, Any] = {}
        for name in _saved():
            mapped = "r" if name == "ids" and _size(directory / "ids.npy") else None
            array = np.load(directory / f"{name}.npy", mmap_mode=mapped)  # type: ignore[arg-type]
            values[name] = tuple(array.tolist()) if name.endswith("_names") else array
        return cls(**values, directory=directory)

    def __reduce__(self) -> tuple[Any, ...]:
        if self.directory is not None:
            return Comparisons.open, (self.directory,)
        return Comparisons, tuple(getattr(self, name) for name in _saved())


def _number(key: str) -> int:
    """64 bits of a digest: of a million prompts two have one number once in 37 million times."""
    digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _saved() -> list[str]:
    return [item.name for item in fields(Comparisons) if item.name != "directory"]


def _size(path: Path) -> int:
    return len(np.load(path, mmap_mode="r"))


def holds_ties(comparisons: Comparisons) -> bool:
    """Whether any pair of the data set is a tie: then all its pairs need a model of ties."""
    return comparisons.counts()["ties"] > 0
