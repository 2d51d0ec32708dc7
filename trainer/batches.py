"""Which pairs make up a step, and who computes which of them. Pure; depends on nothing but indices.

Legend: P pairs, S = ceil(P / B) steps in an epoch, W workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


def steps_per_epoch(num_pairs: int, global_batch_pairs: int) -> int:
    return -(-num_pairs // global_batch_pairs)


def global_batch(
    num_pairs: int, global_batch_pairs: int, seed: int, step: int
) -> NDArray[np.int64]:
    """The pairs of `step` (from 0), in random order; the last batch of an epoch may be smaller.

    A function of the seed and the step alone: the same for any number of workers, and after a
    resume without any saved state.
    """
    epoch, index = divmod(step, steps_per_epoch(num_pairs, global_batch_pairs))
    order = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(num_pairs)
    return order[index * global_batch_pairs : (index + 1) * global_batch_pairs]


def micro_batches(
    pairs: Sequence[int] | NDArray[np.int64],
    lengths: NDArray[np.int64],
    micro_batch_pairs: int,
    rank: int,
    num_workers: int,
) -> list[list[int]]:
    """The forward passes of worker `rank`: lists of pairs, the same number on every worker.

    Pairs are dealt out by length, so that workers have equal work and a forward pass little
    padding; the loss is a sum over pairs and does not depend on it. A worker that has run out of
    pairs gets an empty list: it must still take part in the collectives of a forward pass.
    """
    by_length = sorted((int(i) for i in pairs), key=lambda i: (-lengths[i], i))
    num_passes = -(-len(by_length) // (num_workers * micro_batch_pairs))
    mine = by_length[rank::num_workers]
    return [mine[i * micro_batch_pairs : (i + 1) * micro_batch_pairs] for i in range(num_passes)]
