"""Which keys the queries of a packed forest see, laid out for the attention functions.

Legend: N rows; M queries, all rows or only the pooled ones. Built once for a batch, used by every
layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from reward_actor.engine.forest import Forest

# A run of shared keys shorter than this is read again by each segment below it: joining two parts
# of a softmax costs more than so few keys.
_MIN_SHARED_KEYS = 16

# Keys that are gathered at once for each row of the batch, at most (a single path may be more).
_MAX_KEYS_PER_ROW = 8


@dataclass(frozen=True)
class Runs:
    """Consecutive queries that see the same path: run r is queries [cu_queries[r], cu_queries[r+1])
    of `queries` and keys key_rows[cu_keys[r]:cu_keys[r+1]]; the last query sees the last key."""

    queries: slice
    key_rows: Tensor
    cu_queries: Tensor
    cu_keys: Tensor
    max_queries: int
    max_keys: int


@dataclass(frozen=True)
class AttentionProduct:
    """One product of the cascade. `keys` are rows, `queries` are places among the queries.

    A causal part has the rows `keys` as its queries, too, of which the last ones are `queries`.
    """

    queries: slice
    keys: slice | Tensor
    is_causal: bool


class AttentionPlan:
    """What every layer's attention needs to know of a forest.

    With `pooled`, the queries are the rows at the end of the segments that end a sequence
    (`query_rows`), otherwise all rows in order.
    """

    def __init__(self, forest: Forest, device: torch.device, *, pooled: bool = False) -> None:
        self.forest = forest
        self.device = device
        self.pooled = pooled
        self._segments: NDArray[np.int64] = (
            np.unique(forest.last_segments) if pooled else np.arange(len(forest.starts))
        )
        self.query_rows: NDArray[np.int64] = (
            forest.ends[self._segments] - 1 if pooled else np.arange(forest.num_rows)
        )
        self.longest_path = int(forest.position_ids.max()) + 1

    @cached_property
    def runs(self) -> list[Runs]:
        """All runs; in several parts where their paths together are many times the rows, so that
        gathered keys stay a bounded multiple of the batch."""
        forest = self.forest
        num_keys = forest.position_ids[forest.ends[self._segments] - 1] + 1
        parts = np.cumsum(num_keys) // (_MAX_KEYS_PER_ROW * forest.num_rows)
        borders = [0, *(np.flatnonzero(np.diff(parts)) + 1).tolist(), len(num_keys)]
        return [self._some_runs(first, end) for first, end in pairwise(borders)]

    def _some_runs(self, first: int, end: int) -> Runs:
        forest, segments = self.forest, self._segments[first:end]
        lengths = forest.ends - forest.starts
        if self.pooled:
            lengths = np.ones_like(lengths)
        paths = [forest.path_rows(int(segment)) for segment in segments]
        num_queries, num_keys = lengths[segments], np.array([len(path) for path in paths])
        start = int(lengths[self._segments[:first]].sum())
        return Runs(
            slice(start, start + int(num_queries.sum())),
            torch.from_numpy(np.concatenate(paths)).to(self.device),
            _cumulative(num_queries).to(self.device),
            _cumulative(num_keys).to(self.device),
            int(num_queries.max()),
            int(num_keys.max()),
        )

    @cached_property
    def parts(self) -> list[AttentionProduct]:
        """The products of the cascade, such that every query's first one is its own segment's."""
        forest = self.forest
        own: list[AttentionProduct] = []
        shared: list[AttentionProduct] = []
        # The rows above a segment that no shared part covers: each segment reads them itself.
        above: dict[int, NDArray[np.int64]] = {-1: np.empty(0, np.int64)}
        for segment in range(len(forest.starts)):
            start, end = int(forest.starts[segment]), int(forest.ends[segment])
            tree_end = int(forest.tree_ends[segment])
            carried = above[int(forest.parents[segment])]
            keys = self._rows(carried, start, end)
            queries = self._queries(start, end)
            if queries.start < queries.stop:
                own.append(AttentionProduct(queries, keys, is_causal=not self.pooled))
            below = self._queries(end, tree_end)
            if len(carried) + end - start < _MIN_SHARED_KEYS:
                above[segment] = np.concatenate([carried, np.arange(start, end)])
                continue
            above[segment] = above[-1]
            if below.start < below.stop:
                shared.append(AttentionProduct(below, keys, is_causal=False))
        return own + shared

    def _rows(self, carried: NDArray[np.int64], start: int, end: int) -> slice | Tensor:
        if not len(carried):
            return slice(start, end)
        return torch.from_numpy(np.concatenate([carried, np.arange(start, end)]))

    def _queries(self, start: int, end: int) -> slice:
        if not self.pooled:
            return slice(start, end)
        first, last = np.searchsorted(self.query_rows, [start, end])
        return slice(int(first), int(last))


def _cumulative(counts: NDArray[np.int64]) -> Tensor:
    return torch.from_numpy(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32))
