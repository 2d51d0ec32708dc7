"""Token sequences to a packed forest of shared prefixes. NumPy only.

Every token of every distinct prefix is one row, computed once. Legend: n sequences; N rows; S
segments. A segment is a longest run of tokens that the same sequences share; its path is its
ancestors, root first, and itself. Segments lie in preorder, so the rows below a segment follow it.

    sequences   a b c d e        segment 0: a b      rows 0-1, positions 0-1
                a b c x          segment 1: c        row  2,   position  2      parent 0
                a b y            segment 2: d e      rows 3-4, positions 3-4    parent 1
                                 segment 3: x        row  5,   position  3      parent 1
                                 segment 4: y        row  6,   position  2      parent 0
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from reward_actor.token_ids import in_order, to_bytes

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Ints = NDArray[np.int64]

# A batch that is cut early to spare recomputed prefixes still uses this share of its budget.
_MIN_FILL = 0.5


@dataclass(frozen=True)
class Forest:
    """A batch of sequences laid out once per distinct prefix.

    indices       (n,) the caller's index of each sequence, in lexicographic order of their ids
    token_ids     (N,) and position_ids (N,): a row's token and its depth
    starts, ends  (S,) the rows [start, end) of a segment
    parents       (S,) the segment above, -1 at a root; always smaller than the segment
    tree_ends     (S,) the row after the last row below a segment, or its own end at a leaf
    last_segments (n,) the segment at whose end a sequence ends
    """

    indices: Ints
    token_ids: Ints
    position_ids: Ints
    starts: Ints
    ends: Ints
    parents: Ints
    tree_ends: Ints
    last_segments: Ints

    @property
    def num_rows(self) -> int:
        return len(self.token_ids)

    @property
    def last_rows(self) -> Ints:
        """(n,) the row of every sequence's last token."""
        return self.ends[self.last_segments] - 1

    def path(self, segment: int) -> list[int]:
        """The segments from the root to `segment`, both included."""
        path = [segment]
        while self.parents[path[-1]] >= 0:
            path.append(int(self.parents[path[-1]]))
        return path[::-1]

    def path_rows(self, segment: int) -> Ints:
        """The rows of the whole path, in the order of their positions."""
        spans = [np.arange(self.starts[s], self.ends[s]) for s in self.path(segment)]
        return np.concatenate(spans)


def plan_forests(sequences: Sequence[Sequence[int]], max_batch_tokens: int) -> list[Forest]:
    """Every sequence exactly once, in forests of at most `max_batch_tokens` rows.

    A cut between two forests lies where it makes the fewest tokens be computed again. A sequence
    longer than the budget gets a forest of its own. Raises ValueError for an empty sequence or a
    budget below 1.
    """
    if max_batch_tokens < 1:
        raise ValueError(f"max_batch_tokens is {max_batch_tokens}; it must be at least 1")
    arrays = [np.asarray(sequence, dtype=np.int64) for sequence in sequences]
    for index, array in enumerate(arrays):
        if not len(array):
            raise ValueError(f"sequence {index} is empty")
    order, shared_bytes = in_order(list(map(to_bytes, arrays)))
    shared = [num_bytes // 4 for num_bytes in shared_bytes]
    lengths = [len(arrays[i]) for i in order]
    return [
        _forest([arrays[i] for i in order[first:end]], shared[first:end], order[first:end])
        for first, end in _cuts(lengths, shared, max_batch_tokens)
    ]


def _cuts(lengths: list[int], shared: list[int], budget: int) -> list[tuple[int, int]]:
    """Ranges of the sorted sequences whose distinct tokens fit the budget."""
    ranges = []
    first = 0
    while first < len(lengths):
        num_rows = [lengths[first]]
        end = first + 1
        while end < len(lengths):
            more = num_rows[-1] + lengths[end] - shared[end]
            if more > budget:
                break
            num_rows.append(more)
            end += 1
        if end < len(lengths):
            full = [
                i
                for i in range(first + 1, end + 1)
                if num_rows[i - first - 1] >= budget * _MIN_FILL
            ]
            end = min(full or [end], key=lambda i: (shared[i], -i))
        ranges.append((first, end))
        first = end
    return ranges


def _forest(arrays: list[Ints], shared: list[int], indices: list[int]) -> Forest:
    """The compressed prefix tree of sorted sequences; `shared[i]` counts those of i - 1 and i."""
    starts: list[int] = []
    ends: list[int] = []
    parents: list[int] = []
    tokens: list[Ints] = []
    positions: list[Ints] = []
    last_segments = np.empty(len(arrays), dtype=np.int64)
    num_rows = 0
    branch = np.asarray(shared, dtype=np.int64)
    branch[0] = 0
    # (first, end) sequences that share their first `depth` tokens, which lie in `parent` and above.
    pending = [(0, len(arrays), 0, -1)]
    while pending:
        first, end, depth, parent = pending.pop()
        inner = branch[first + 1 : end]
        bottom = int(inner.min()) if len(inner) else len(arrays[first])
        if bottom > depth:
            starts.append(num_rows)
            num_rows += bottom - depth
            ends.append(num_rows)
            parents.append(parent)
            tokens.append(arrays[first][depth:bottom])
            positions.append(np.arange(depth, bottom))
            parent = len(starts) - 1
        while first < end and len(arrays[first]) == bottom:
            last_segments[first] = parent
            first += 1
        inner = branch[first + 1 : end]
        splits = [first, *(np.flatnonzero(inner == bottom) + first + 1).tolist(), end]
        children = [(a, b, bottom, parent) for a, b in pairwise(splits) if a < b]
        pending.extend(reversed(children))
    tree_ends = list(ends)
    for segment in range(len(starts) - 1, 0, -1):
        above = parents[segment]
        if above >= 0:
            tree_ends[above] = max(tree_ends[above], tree_ends[segment])
    return Forest(
        indices=np.asarray(indices, dtype=np.int64),
        token_ids=np.concatenate(tokens),
        position_ids=np.concatenate(positions),
        starts=np.asarray(starts),
        ends=np.asarray(ends),
        parents=np.asarray(parents),
        tree_ends=np.asarray(tree_ends),
        last_segments=last_segments,
    )
