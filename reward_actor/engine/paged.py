"""Attention over a packed forest by vLLM's CPU kernel, called without vLLM's Python.

The kernel reads keys by tables of blocks (Kwon et al., PagedAttention, arXiv:2309.06180, section
4.1), so that sequences share the blocks of a prefix. Of a forest each segment is one request: its
queries are its rows, its table names the blocks that its ancestors fill and, after them, its own.
Where a segment begins inside a block, the rows above it in that block are written once more, into
the first of its own.

Legend: N rows; S segments; M queries in R requests; B rows of a block; Hq, Hkv and D as in
`attention`.
"""

from __future__ import annotations

import threading
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from reward_actor.torch_internals import takes_amx_tiles
from reward_actor.vllm_kernels import is_here

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from reward_actor.engine.forest import Forest

BLOCK = 32
"""B; the kernel wants multiples of 32. Small ones waste less on short segments."""

# A forest of short segments is mostly the padding of their blocks. That matters beyond some size.
_MAX_SLOTS_PER_ROW = 2
_FEW_SLOTS = 8192

_WIDTHS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Head widths that the kernel is compiled for."""

# The kernel has one scratchpad for the whole process.
_ONE_AT_A_TIME = threading.Lock()


class Pages:
    """Where a forest's keys lie in blocks, and which of these each segment's path is in."""

    def __init__(self, forest: Forest) -> None:
        self._forest = forest
        self._first = forest.position_ids[forest.starts]  # position of a segment's first row
        self._num_keys = self._first + forest.ends - forest.starts  # of its whole path
        self._shared = self._first // BLOCK  # blocks that its ancestors fill
        self._num_own = -(-self._num_keys // BLOCK) - self._shared
        self._own = np.cumsum(self._num_own) - self._num_own  # the first of its own
        self.num_blocks = int(self._num_own.sum())
        self._caches: dict[Any, tuple[Tensor, Tensor]] = {}

    @property
    def is_dense(self) -> bool:
        """Whether the blocks hold few slots beyond the rows', or few altogether."""
        most = max(_FEW_SLOTS, _MAX_SLOTS_PER_ROW * self._forest.num_rows)
        return self.num_blocks * BLOCK <= most

    @cached_property
    def num_keys(self) -> Tensor:
        """(S,) int32: the rows of each segment's path."""
        return torch.from_numpy(self._num_keys.astype(np.int32))

    @cached_property
    def tables(self) -> Tensor:
        """(S, most blocks of a path) int32: the blocks of each segment's path, root first."""
        tables = np.zeros((len(self._own), int((self._shared + self._num_own).max())), np.int32)
        for segment, parent in enumerate(self._forest.parents):
            full, new = self._shared[segment], self._num_own[segment]
            if parent >= 0:
                tables[segment, :full] = tables[parent, :full]
            first = self._own[segment]
            tables[segment, full : full + new] = np.arange(first, first + new)
        return torch.from_numpy(tables)

    @cached_property
    def slots(self) -> Tensor:
        """(N,) int64: where every row lies, block * B + its place there."""
        forest = self._forest
        of_row = np.repeat(np.arange(len(self._own)), forest.ends - forest.starts)
        return torch.from_numpy((self._own - self._shared)[of_row] * BLOCK + forest.position_ids)

    @cached_property
    def copies(self) -> tuple[Tensor, Tensor]:
        """(C,) and (C,) int64: rows that are written once more, and where."""
        rows, slots = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for segment, parent in enumerate(self._forest.parents):
            count = int(self._first[segment] % BLOCK)
            if parent >= 0 and count:
                rows.append(self._last_rows(int(parent), count))
                slots.append(self._own[segment] * BLOCK + np.arange(count))
        return torch.from_numpy(np.concatenate(rows)), torch.from_numpy(np.concatenate(slots))

    def _last_rows(self, segment: int, count: int) -> NDArray[np.int64]:
        """The last `count` rows of the path down to the end of `segment`."""
        spans = []
        while count:
            start, end = int(self._forest.starts[segment]), int(self._forest.ends[segment])
            some = min(count, end - start)
            spans.append(np.arange(end - some, end))
            count -= some
            segment = int(self._forest.parents[segment])
        return np.concatenate(spans[::-1])

    def write(self, key: Tensor, value: Tensor, isa: str) -> tuple[Tensor, Tensor]:
        """(N, Hkv, D), (N, Hkv, D) -> keys and values (blocks, Hkv, B, D), over those before."""
        name = *key.shape[1:], key.dtype
        if name not in self._caches:
            # Zeros, since what is masked is still multiplied by 0, which must not be a NaN.
            shape = (self.num_blocks, key.shape[1], 2 * BLOCK, key.shape[2])
            keys, values = torch.zeros(shape, dtype=key.dtype).chunk(2, dim=2)
            self._caches[name] = keys, values
        keys, values = self._caches[name]
        rows, again = self.copies
        write = torch.ops._C.cpu_attn_reshape_and_cache
        write(key, value, keys, values, self.slots, isa, 1.0, 1.0, "auto")
        if len(rows):
            write(key[rows], value[rows], keys, values, again, isa, 1.0, 1.0, "auto")
        return keys, values


class PagedAttention:
    """The kernel for some of a forest's segments; every layer writes over the last one's keys."""

    def __init__(self, pages: Pages, segments: NDArray[np.int64], cu_queries: Tensor) -> None:
        """segments: (R,) in order. cu_queries: (R + 1,) int32: where the queries of each begin, and
        their end; they are its last rows."""
        self.pages = pages
        self._tables = pages.tables[torch.from_numpy(segments)]
        self._num_keys = pages.num_keys[torch.from_numpy(segments)]
        self._cu_queries = cu_queries
        self._schedules: dict[Any, Tensor] = {}

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None = None,
        window: int | None = None,
    ) -> Tensor:
        """(M, Hq, D), (N, Hkv, D), (N, Hkv, D) -> (M, Hq, D). Raises ValueError for values of
        another width than the keys'."""
        if key.shape != value.shape or query.shape[-1] != key.shape[-1]:
            raise ValueError(f"keys of {tuple(key.shape)}, values of {tuple(value.shape)}")
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        width = query.shape[-1]
        isa = _instructions(width, query.dtype)
        window = -1 if window is None else window
        keys, values = self.pages.write(key, value, isa)
        output = torch.empty_like(query)
        with _ONE_AT_A_TIME:
            torch.ops._C.cpu_attention_with_kv_cache(
                query,
                keys,
                values,
                output,
                self._cu_queries,
                self._num_keys,
                width**-0.5 if scale is None else scale,
                True,  # causal: a request's last query stands at its last key
                None,
                window,
                self._tables,
                0.0,
                self._schedule(query, key.shape[1], window, isa),
                None,
                None,
            )
        return output

    def _schedule(self, query: Tensor, num_key_heads: int, window: int, isa: str) -> Tensor:
        """How the kernel divides the work among threads; the same in every layer alike."""
        _, num_heads, width = query.shape
        name = num_heads, num_key_heads, width, query.dtype, window
        if name not in self._schedules:
            self._schedules[name] = torch.ops._C.get_scheduler_metadata(
                len(self._num_keys),
                num_heads,
                num_key_heads,
                width,
                self._num_keys,
                query.dtype,
                self._cu_queries,
                True,
                window,
                isa,
                False,  # keys are not split between threads, by which a sum's order would differ
                None,
                "auto",
            )
        return self._schedules[name]


def is_better(width: int | None, device: torch.device) -> bool:
    """Whether the kernel is here, knows heads of this width, and is faster than ours.

    With AVX-512 it is, by half and more. With AVX2 torch's products are as fast as the processor,
    and those of a cascade read a shared key once for all who see it.
    """
    has_avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return device.type == "cpu" and width in _WIDTHS and has_avx512 and is_here()


def _instructions(width: int, dtype: torch.dtype) -> Literal["amx", "vec", "vec16"]:
    """What the kernel calls the instructions that it shall use, as vLLM chooses them."""
    if width % 32:
        return "vec16"
    return "amx" if dtype == torch.bfloat16 and takes_amx_tiles() else "vec"
