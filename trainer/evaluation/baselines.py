"""What a reward model has to beat: rewards by length alone, and by a bag of words.

Both learn from the training pairs and are measured on the held-out ones, as the model is.
Shapes: S sequences, P pairs, V different token ids, N entries of bags.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, softplus

from reward_actor.token_ids import common_prefix, to_bytes
from trainer.data.comparisons import Comparisons
from trainer.evaluation.metrics import pair_indices

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Indices = NDArray[np.int64]

LENGTH, BAG_OF_WORDS = "length", "bag of words"
_MAX_PAIRS = 20_000  # to learn words from: with more it hardly gets better
_BLOCK = 10_000  # sequences
_MAX_ITERATIONS = 200


def baseline_rewards(
    train: Comparisons, heldout: Comparisons, seed: int = 0
) -> dict[str, NDArray[np.float32]]:
    """For each baseline, by its name, (S,) rewards of the held-out sequences; empty without pairs
    on both sides. `seed` draws the pairs to learn from where there are very many."""
    chosen, rejected, _ = pair_indices(train)
    if not len(chosen) or not len(pair_indices(heldout)[0]):
        return {}
    if len(chosen) > _MAX_PAIRS:
        random = np.random.Generator(np.random.PCG64(seed))
        some = np.sort(random.choice(len(chosen), _MAX_PAIRS, replace=False))
        chosen, rejected = chosen[some], rejected[some]
    longer = int(np.sign(train.lengths[chosen] - train.lengths[rejected]).sum())
    words = _BagOfWords(train, chosen, rejected)
    return {
        LENGTH: heldout.lengths.astype(np.float32) * (1 if longer >= 0 else -1),
        BAG_OF_WORDS: words.rewards(heldout),
    }


class _Bags(NamedTuple):
    """What `embedding_bag` takes: the ids of all bags, where each bag begins, their values."""

    input: Tensor
    offsets: Tensor
    per_sample_weights: Tensor


class _BagOfWords:
    """A Bradley-Terry model whose reward is linear in the TF-IDF of the token ids of a completion
    and in the logarithm of their number: a logistic regression of the pairs' differences.

    Logarithmic counts, smoothed inverse document frequencies and vectors of length 1 (Manning,
    Raghavan and Schuetze, 2008, chapter 6); the penalty is half the squared weights, for the sum
    over the pairs.
    """

    def __init__(self, train: Comparisons, chosen: Indices, rejected: Indices) -> None:
        used, places = np.unique(np.concatenate([chosen, rejected]), return_inverse=True)
        better, worse = torch.from_numpy(places).chunk(2)
        counted = _counted(train, used)
        self._words, num_in = np.unique(counted.ids, return_counts=True)
        self._idf = np.log((1 + len(used)) / (1 + num_in)) + 1
        bags = self._bags(counted)
        weights = torch.zeros(len(self._words) + 1, 1, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS(
            [weights], max_iter=_MAX_ITERATIONS, line_search_fn="strong_wolfe"
        )

        def loss() -> Tensor:
            optimizer.zero_grad()
            rewards = _rewards(bags, weights)
            total = softplus(rewards[worse] - rewards[better]).sum() + weights.square().sum() / 2
            total.backward()
            return total

        optimizer.step(loss)
        self._weights = weights.detach()

    def rewards(self, comparisons: Comparisons) -> NDArray[np.float32]:
        num = comparisons.num_sequences
        rewards = []
        for some in np.split(np.arange(num), range(_BLOCK, num, _BLOCK)):
            bags = self._bags(_counted(comparisons, some))
            rewards.append(_rewards(bags, self._weights))
        return torch.cat(rewards).numpy().astype(np.float32)

    def _bags(self, counted: _Counted) -> _Bags:
        """Entry V, the last one, is the logarithm of the length."""
        place = np.searchsorted(self._words, counted.ids).clip(max=len(self._words) - 1)
        known = self._words[place] == counted.ids
        place, owner = place[known], counted.owners[known]
        values = (1 + np.log(counted.counts[known])) * self._idf[place]
        num = len(counted.lengths)
        values /= np.sqrt(np.bincount(owner, values**2, num))[owner]
        ends = np.searchsorted(owner, np.arange(num), side="right")
        lengths = np.log1p(counted.lengths)
        return _Bags(
            torch.from_numpy(np.insert(place, ends, len(self._words))),
            torch.from_numpy(np.concatenate([[0], ends[:-1] + np.arange(1, num)])),
            torch.from_numpy(np.insert(values, ends, lengths)),
        )


def _rewards(bags: _Bags, weights: Tensor) -> Tensor:
    return embedding_bag(weight=weights, mode="sum", **bags._asdict()).squeeze(1)


class _Counted(NamedTuple):
    """How often which token id is in which sequence, ordered by sequence and id."""

    owners: Indices
    ids: Indices
    counts: Indices
    lengths: Indices
    """(S,) tokens of each sequence."""


def _counted(comparisons: Comparisons, sequences: Indices) -> _Counted:
    """Of (S,) rising sequences, without what all sequences of a comparison begin with."""
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
    return _Counted(keys // base, keys % base, counts, lengths)


def _num_shared(comparisons: Comparisons, comparison: int) -> int:
    begin, end = comparisons.starts[comparison : comparison + 2]
    cuts = comparisons.offsets[begin : end + 1].tolist()
    return common_prefix(*(to_bytes(comparisons.ids[a:b]) for a, b in pairwise(cuts))) // 4
