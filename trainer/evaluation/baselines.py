"""What a reward model has to beat: rewards by length alone, and by a bag of words.

Both learn from the training pairs and are measured on the held-out ones, as the model is.
Shapes: S sequences, V different token ids, N entries (a token id in a sequence, how often).
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from reward_actor.token_ids import common_prefix, to_bytes
from trainer.data.comparisons import Comparisons
from trainer.data.gather import take
from trainer.evaluation.metrics import pair_indices

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    Floats = NDArray[np.float64]
    Indices = NDArray[np.int64]

LENGTH, BAG_OF_WORDS = "length", "bag of words"
_MAX_PAIRS = 20_000  # to learn from: with more, a bag of words hardly gets better
_BLOCK = 10_000  # sequences whose tokens are in memory at a time
_MAX_ITERATIONS = 200


def baseline_rewards(
    train: Comparisons, heldout: Comparisons, seed: int = 0
) -> dict[str, NDArray[np.float32]]:
    """For each baseline, by its name, (S,) rewards of the held-out sequences; empty without pairs
    on both sides. `seed` draws the comparisons to learn from where there are very many."""
    some = _drawn(train, seed)
    chosen, rejected, _ = pair_indices(some)
    if not len(chosen) or not len(pair_indices(heldout)[0]):
        return {}
    longer = int(np.sign(some.lengths[chosen] - some.lengths[rejected]).sum())
    return {
        LENGTH: heldout.lengths.astype(np.float32) * (1 if longer >= 0 else -1),
        BAG_OF_WORDS: _BagOfWords(some, chosen, rejected).rewards(heldout),
    }


def _drawn(comparisons: Comparisons, seed: int) -> Comparisons:
    """All, or as many as have _MAX_PAIRS pairs."""
    sizes = np.diff(comparisons.starts)
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(comparisons))
    num_pairs = np.cumsum(sizes[order] * (sizes[order] - 1) // 2)
    if not len(order) or num_pairs[-1] <= _MAX_PAIRS:
        return comparisons
    return take(comparisons, np.sort(order[: np.searchsorted(num_pairs, _MAX_PAIRS) + 1]))


class _Counts(NamedTuple):
    """How often which token id is in which sequence, each (N,), ordered by sequence and id."""

    owners: Indices
    ids: Indices
    counts: Indices
    lengths: Indices
    """(S,) tokens of each sequence."""


class _BagOfWords:
    """A Bradley-Terry model whose reward is linear in the TF-IDF of the token ids of a completion
    and in the logarithm of their number: a logistic regression of the pairs' differences.

    Logarithmic counts, smoothed inverse document frequencies and vectors of length 1 (Manning,
    Raghavan and Schuetze, 2008, chapter 6); the penalty is half the squared weights, for the sum
    over the pairs. Of each comparison what all of its sequences begin with is left out.
    """

    def __init__(self, train: Comparisons, chosen: Indices, rejected: Indices) -> None:
        used, places = np.unique(np.concatenate([chosen, rejected]), return_inverse=True)
        better, worse = np.split(places, 2)
        counts = _counted(train, used)
        self._words, num_in = np.unique(counts.ids, return_counts=True)
        self._idf = np.log((1 + len(used)) / (1 + num_in)) + 1
        owners, words, values = self._entries(counts)
        self._weights = np.zeros(len(self._words) + 1)
        weights = torch.from_numpy(self._weights)
        optimizer = torch.optim.LBFGS(
            [weights], max_iter=_MAX_ITERATIONS, line_search_fn="strong_wolfe"
        )

        def loss() -> Tensor:
            rewards = np.bincount(owners, values * self._weights[words], len(used))
            margin = rewards[better] - rewards[worse]
            slope = -np.exp(-np.logaddexp(0, margin))
            of_rewards = np.bincount(better, slope, len(used)) - np.bincount(
                worse, slope, len(used)
            )
            of_words = np.bincount(words, values * of_rewards[owners], len(self._weights))
            weights.grad = torch.from_numpy(of_words + self._weights)
            total = np.logaddexp(0, -margin).sum() + (self._weights**2).sum() / 2
            return torch.tensor(total)

        optimizer.step(loss)

    def rewards(self, comparisons: Comparisons) -> NDArray[np.float32]:
        """(S,) of all sequences."""
        rewards: list[Floats] = [np.zeros(0)]
        for some in _blocks(np.arange(comparisons.num_sequences)):
            owners, words, values = self._entries(_counted(comparisons, some))
            of_words = values * self._weights[words]
            rewards.append(np.bincount(owners, of_words, len(some)).astype(np.float64))
        return np.concatenate(rewards).astype(np.float32)

    def _entries(self, counts: _Counts) -> tuple[Indices, Indices, Floats]:
        """(N,) sequences, (N,) words, of which V is the length, and (N,) values."""
        word = np.searchsorted(self._words, counts.ids).clip(max=len(self._words) - 1)
        known = self._words[word] == counts.ids
        word, owner = word[known], counts.owners[known]
        values = (1 + np.log(counts.counts[known])) * self._idf[word]
        num = len(counts.lengths)
        values /= np.sqrt(np.bincount(owner, values**2, num))[owner]
        return (
            np.concatenate([owner, np.arange(num)]),
            np.concatenate([word, np.full(num, len(self._words))]),
            np.concatenate([values, np.log1p(counts.lengths)]),
        )


def _blocks(sequences: Indices) -> list[Indices]:
    return np.split(sequences, range(_BLOCK, len(sequences), _BLOCK))


def _counted(comparisons: Comparisons, sequences: Indices) -> _Counts:
    """Of (S,) rising sequences."""
    parts, first = [], 0
    for some in _blocks(sequences):
        part = _counted_block(comparisons, some)
        parts.append(part._replace(owners=part.owners + first))
        first += len(some)
    return _Counts(*map(np.concatenate, zip(*parts, strict=True)))


def _counted_block(comparisons: Comparisons, sequences: Indices) -> _Counts:
    their, place = np.unique(
        np.searchsorted(comparisons.starts, sequences, side="right") - 1, return_inverse=True
    )
    shared = np.array([_num_shared(comparisons, one) for one in their.tolist()], dtype=np.int64)
    begin, end = comparisons.offsets[sequences] + shared[place], comparisons.offsets[sequences + 1]
    lengths = end - begin
    owners = np.repeat(np.arange(len(sequences)), lengths)
    first = np.cumsum(lengths) - lengths
    ids = comparisons.ids[np.arange(len(owners)) - first[owners] + begin[owners]]
    base = int(ids.max(initial=0)) + 1
    keys, counts = np.unique(owners * base + ids, return_counts=True)
    return _Counts(keys // base, keys % base, counts, lengths)


def _num_shared(comparisons: Comparisons, comparison: int) -> int:
    begin, end = comparisons.starts[comparison : comparison + 2]
    cuts = comparisons.offsets[begin : end + 1].tolist()
    return common_prefix(*(to_bytes(comparisons.ids[a:b]) for a, b in pairwise(cuts))) // 4
