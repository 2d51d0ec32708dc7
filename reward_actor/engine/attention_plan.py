"""Which keys the queries of a packed forest see, laid out for the attention functions.

Legend: N rows; M queries, all rows or only the pooled ones. Built once for a batch, used by every
layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from reward_actor.engine.paged import PagedAttention, Pages

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch.nn.attention.flex_attention import BlockMask

    from reward_actor.engine.forest import Forest

Kernel = Literal["paged", "flex"]
"""One that not every machine has: `paged.PagedAttention` (CPU), or FlexAttention (CUDA)."""

# A run of shared keys shorter than this is read again by each segment below it: joining two parts
# of a softmax costs more than so few keys.
_MIN_SHARED_KEYS = 16

_MASK_BLOCK = 128
"""Rows and keys of a block of FlexAttention's mask."""

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
    (`query_rows`), otherwise all rows in order. `kernel`: one that may be used, beside those that
    are always there.
    """

    def __init__(
        self,
        forest: Forest,
        device: torch.device,
        *,
        pooled: bool = False,
        kernel: Kernel | None = None,
        pages: Pages | None = None,
    ) -> None:
        """pages: those of another plan of this forest."""
        self.forest = forest
        self.device = device
        self.pooled = pooled
        self.kernel = kernel
        self._pages = pages
        self._segments: NDArray[np.int64] = (
            np.unique(forest.last_segments) if pooled else np.arange(len(forest.starts))
        )
        self.query_rows: NDArray[np.int64] = (
            forest.ends[self._segments] - 1 if pooled else np.arange(forest.num_rows)
        )
        lengths = (forest.ends - forest.starts)[self._segments]
        self._num_queries = np.ones_like(lengths) if pooled else lengths
        self.longest_path = int(forest.position_ids.max()) + 1
        self._block_masks: dict[int | None, BlockMask] = {}

    def of_pooled(self) -> AttentionPlan:
        """The plan whose queries are the pooled rows only, with what both can share."""
        pages = self.pages if self.kernel == "paged" else None
        return AttentionPlan(self.forest, self.device, pooled=True, kernel=self.kernel, pages=pages)

    @property
    def pages(self) -> Pages:
        if self._pages is None:
            self._pages = Pages(self.forest)
        return self._pages

    def takes_pages(self, dtype: torch.dtype) -> bool:
        """Whether `paged` is to be used: in float32 not for a forest that would waste memory on it.
        In half precision always, since the two ways round differently, and a reward must not
        change with its neighbours."""
        return self.kernel == "paged" and (dtype != torch.float32 or self.pages.is_dense)

    @cached_property
    def paged(self) -> PagedAttention:
        return PagedAttention(self.pages, self._segments, _cumulative(self._num_queries))

    def block_mask(self, window: int | None = None) -> BlockMask:
        """(M, N) what FlexAttention needs to know; window: as for `attend`.

        The rows that see a key are an interval: those behind it, up to the end of what lies below
        its segment. So which blocks are seen, wholly or in part, follows from each block's ends.
        """
        if window not in self._block_masks:
            self._block_masks[window] = self._block_mask(window)
        return self._block_masks[window]

    def _block_mask(self, window: int | None) -> BlockMask:
        from torch.nn.attention.flex_attention import BlockMask

        forest, rows = self.forest, self.query_rows
        depths = forest.position_ids
        ends = np.repeat(forest.tree_ends, forest.ends - forest.starts)
        some = np.arange(0, len(rows), _MASK_BLOCK)
        first, last = rows[some], rows[np.minimum(some + _MASK_BLOCK, len(rows)) - 1]
        keys = np.arange(0, forest.num_rows, _MASK_BLOCK)
        last_key = np.minimum(keys + _MASK_BLOCK, forest.num_rows) - 1
        any_seen = (keys <= last[:, None]) & (np.maximum.reduceat(ends, keys) > first[:, None])
        all_seen = (last_key <= first[:, None]) & (np.minimum.reduceat(ends, keys) > last[:, None])
        if window is not None:
            at_row, at_key = depths[rows], depths
            least = np.minimum.reduceat(at_row, some)[:, None] - np.maximum.reduceat(at_key, keys)
            most = np.maximum.reduceat(at_row, some)[:, None] - np.minimum.reduceat(at_key, keys)
            any_seen, all_seen = any_seen & (least < window), all_seen & (most < window)
        # What only a part of a block's rows sees, or so it may be, is asked for each of its pairs.
        row_of, depth_of, end_of = (
            torch.from_numpy(array).to(self.device) for array in (rows, depths, ends)
        )

        def sees(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            row = row_of[query]
            is_seen = (key <= row) & (row < end_of[key])
            if window is None:
                return is_seen
            return is_seen & (depth_of[row] - depth_of[key] < window)

        return BlockMask.from_kv_blocks(
            *self._listed(any_seen & ~all_seen),
            *self._listed(all_seen & any_seen),
            BLOCK_SIZE=_MASK_BLOCK,
            mask_mod=sees,
            seq_lengths=(len(rows), forest.num_rows),
        )

    def _listed(self, chosen: NDArray[np.bool_]) -> tuple[Tensor, Tensor]:
        """(blocks of queries, of keys) -> how many are chosen of each row, and which, in front."""
        counts = chosen.sum(axis=1).astype(np.int32)
        order = np.argsort(~chosen, axis=1, kind="stable").astype(np.int32)
        return tuple(  # type: ignore[return-value]
            torch.from_numpy(array)[None, None].to(self.device) for array in (counts, order)
        )

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
        paths = [self.forest.path_rows(int(segment)) for segment in self._segments[first:end]]
        num_queries, num_keys = self._num_queries[first:end], np.array([len(p) for p in paths])
        start = int(self._num_queries[:first].sum())
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
