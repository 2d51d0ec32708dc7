"""Which comparisons make up a step, and who computes which of them. Pure: NumPy and lists.

Legend: C comparisons, W workers. A micro-batch is one forward and backward pass of a worker: a list
of comparisons. Every worker has the same number of micro-batches, because under ZeRO 3 all of them
take part in each; a worker that has run out of comparisons gets empty ones. A comparison is never
split.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from reward_actor.token_ids import in_order, to_bytes

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from trainer.data.comparisons import Comparisons

MicroBatches = list[list[int]]


def steps_per_epoch(num_comparisons: int, global_batch_pairs: int) -> int:
    return -(-num_comparisons // global_batch_pairs)


def global_batch(
    num_comparisons: int, global_batch_pairs: int, seed: int, step: int
) -> NDArray[np.int64]:
    """The comparisons of `step` (from 0), in random order; an epoch's last batch may be smaller.

    A function of the seed and the step alone: the same for any number of workers, and after a
    resume without any saved state.
    """
    epoch, index = divmod(step, steps_per_epoch(num_comparisons, global_batch_pairs))
    order = _order(num_comparisons, seed, epoch)
    return order[index * global_batch_pairs : (index + 1) * global_batch_pairs]


@lru_cache(maxsize=1)  # seconds for ten million, and every step of an epoch asks for it
def _order(num_comparisons: int, seed: int, epoch: int) -> NDArray[np.int64]:
    order = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(num_comparisons)
    order.flags.writeable = False
    return order


def forest_micro_batches(
    costs: Sequence[int], max_tokens: int, num_workers: int
) -> list[MicroBatches]:
    """For every worker its micro-batches, as places in `costs`: each comparison's distinct tokens.

    As few micro-batches as hold `max_tokens` each, filled evenly: the largest comparison first,
    each into the emptiest micro-batch. A comparison larger than `max_tokens` gets its own.
    """
    order = sorted(range(len(costs)), key=lambda i: (-costs[i], i))
    num_each = max(1, -(-sum(costs) // (max_tokens * num_workers)))
    while True:
        bins = _fill(order, costs, num_each * num_workers)
        if all(len(items) < 2 or sum(costs[i] for i in items) <= max_tokens for items in bins):
            return [bins[worker::num_workers] for worker in range(num_workers)]
        num_each += 1


def _fill(order: Sequence[int], costs: Sequence[int], num_bins: int) -> list[list[int]]:
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    emptiest = [(0, number) for number in range(num_bins)]
    for item in order:
        tokens, number = emptiest[0]
        heapq.heapreplace(emptiest, (tokens + costs[item], number))
        bins[number].append(item)
    return bins


def padded_micro_batches(
    longest: Sequence[int], widths: Sequence[int], max_tokens: int, num_workers: int
) -> list[MicroBatches]:
    """The same where every sequence is padded to its micro-batch's longest: like lengths together.

    `longest`: tokens of each comparison's longest sequence; `widths`: how many sequences it has.
    """
    order = sorted(range(len(longest)), key=lambda i: (-longest[i], i))
    micro_batches: MicroBatches = []
    num_rows = 0
    for item in order:  # the first of a micro-batch is its longest
        if (
            micro_batches
            and (num_rows + widths[item]) * longest[micro_batches[-1][0]] <= max_tokens
        ):
            micro_batches[-1].append(item)
            num_rows += widths[item]
        else:
            micro_batches.append([item])
            num_rows = widths[item]
    micro_batches += [[] for _ in range(-len(micro_batches) % num_workers)]
    return [micro_batches[worker::num_workers] for worker in range(num_workers)]


def distinct_tokens(comparisons: Comparisons, index: int) -> int:
    """Tokens of one comparison's sequences, those of shared prefixes counted once."""
    first, end = comparisons.starts[index : index + 2]
    bounds = pairwise(comparisons.offsets[first : end + 1])
    sequences = [to_bytes(comparisons.ids[a:b]) for a, b in bounds]
    _, shared_bytes = in_order(sequences)
    return (sum(map(len, sequences)) - sum(num // 4 * 4 for num in shared_bytes)) // 4


def with_noise(
    sequences: Sequence[list[int]],
    share: float,
    vocabulary: NDArray[np.int32],
    random: np.random.Generator,
) -> list[list[int]]:
    """A comparison's sequences, a `share` of their tokens replaced by ones drawn from `vocabulary`.

    At the same places, by the same ones, in all of them: what they begin with alike stays alike.
    The last token of each, where the head reads, stays. (Word dropout, as in Iyyer et al., 2015,
    "Deep unordered composition rivals syntactic methods for text classification", section 3.1, but
    with other words in the gaps: networks see no gaps when they score.)
    """
    longest = max(map(len, sequences))
    is_replaced = random.random(longest) < share
    noise = random.choice(vocabulary, longest)
    noisy = []
    for ids in sequences:
        replaced = np.where(is_replaced[: len(ids)], noise[: len(ids)], ids)
        replaced[-1] = ids[-1]
        noisy.append(replaced.tolist())
    return noisy


def plan(
    comparisons: Comparisons,
    batch: Sequence[int] | NDArray[np.int64],
    max_tokens: int,
    num_workers: int,
    *,
    packed: bool,
) -> list[MicroBatches]:
    """For every worker its micro-batches of `batch`, as indices of `comparisons`."""
    items = [int(i) for i in batch]
    if packed:
        micro_batches = forest_micro_batches(
            [distinct_tokens(comparisons, i) for i in items], max_tokens, num_workers
        )
    else:
        longest = comparisons.longest_of(items)
        widths = [int(comparisons.starts[i + 1] - comparisons.starts[i]) for i in items]
        micro_batches = padded_micro_batches(longest, widths, max_tokens, num_workers)
    return [[[items[i] for i in one] for one in mine] for mine in micro_batches]
