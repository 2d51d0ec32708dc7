"""From the network's output to the loss of every comparison of a micro-batch, and its counts.

Shapes: C comparisons of up to K completions, S sequences, A attributes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from trainer.loss import (
    attribute_loss,
    bradley_terry,
    centering,
    correct,
    davidson,
    log_exp,
    plackett_luce,
    rao_kupper,
)

if TYPE_CHECKING:
    from trainer.comparisons import Comparisons
    from trainer.config import LossConfig


@dataclass(frozen=True)
class Labels:
    """What is known about the comparisons of a micro-batch, as `Comparisons` keeps it."""

    starts: Tensor
    """(C + 1,) int64: the first sequence of each comparison."""
    scores: Tensor
    """(S,) the order within a comparison, higher is better, never rising; equal for a tie."""
    margins: Tensor
    """(C,) by how much chosen is better."""
    attributes: Tensor
    """(S, A) targets of the regression heads, NaN where unknown."""

    @classmethod
    def of(
        cls, comparisons: Comparisons, indices: Sequence[int], device: torch.device | str
    ) -> Labels:
        """Those of the comparisons at `indices`, in this order."""
        chosen = np.asarray(indices, dtype=np.int64)
        first, sizes = comparisons.starts[chosen], np.diff(comparisons.starts)[chosen]
        starts = np.concatenate([[0], np.cumsum(sizes)])
        sequences = np.repeat(first - starts[:-1], sizes) + np.arange(starts[-1])
        return cls(
            starts=torch.as_tensor(starts, device=device),
            scores=torch.as_tensor(comparisons.scores[sequences], device=device),
            margins=torch.as_tensor(comparisons.margins[chosen], device=device),
            attributes=torch.as_tensor(comparisons.attributes[sequences], device=device),
        )


@dataclass(frozen=True)
class Losses:
    """What the network's output for a micro-batch costs."""

    losses: Tensor
    """(C,) everything that a comparison costs, not reduced."""
    rewards: Tensor
    """(S,) one number for each sequence, however many heads there are."""


@dataclass(frozen=True)
class PairCounts:
    """Sums over all pairs of a comparison's completions with different scores; () float64."""

    num_pairs: Tensor
    num_correct: Tensor
    """Pairs in which the better one has the higher reward; equal rewards count half."""
    sum_margin: Tensor
    """Of reward_chosen - reward_rejected."""


def comparison_losses(
    outputs: Tensor, labels: Labels, config: LossConfig, has_ties: bool
) -> Losses:
    """(S,) rewards, or (S, A) attributes if the config names any, -> the loss of each comparison.

    A comparison costs its preference loss (of a pair, or of a ranking by `plackett_luce`; none for
    a single completion), the centring of its rewards, and the mean of its sequences' attribute
    losses. `has_ties` is a fact of the whole training set (`holds_ties`): only if the model of ties
    has decided pairs, too, their probabilities and those of the ties add up to 1.
    """
    values = outputs if outputs.dtype == torch.float64 else outputs.float()
    if config.attributes:
        heads = values.reshape(len(values), len(config.attributes))
        rewards = (heads * values.new_tensor(list(config.attributes.values()))).sum(-1)
    else:
        rewards = values
    assert rewards.shape == labels.scores.shape, (rewards.shape, labels.scores.shape)

    index, mask = _rows(labels)
    sizes = labels.starts.diff()
    losses = rewards.new_zeros(len(sizes))
    pairs, rankings = sizes == 2, sizes > 2
    losses = losses.index_put((pairs,), _pair_losses(rewards, labels, pairs, config, has_ties))
    ranked = index[rankings]
    losses = losses.index_put(
        (rankings,), plackett_luce(rewards[ranked], labels.scores[ranked], mask[rankings])
    )
    if config.center_rewards_coefficient:
        losses = losses + config.center_rewards_coefficient * centering(rewards[index], mask)
    if config.attributes:
        errors = torch.where(mask, attribute_loss(heads, labels.attributes)[index], 0)
        losses = losses + config.attribute_coefficient * errors.sum(-1) / sizes
    return Losses(losses, rewards)


@torch.no_grad()
def pair_counts(rewards: Tensor, labels: Labels) -> PairCounts:
    """What (S,) rewards make of the micro-batch, for the log."""
    index, mask = _rows(labels)
    scores, wide = labels.scores[index], rewards[index].double()
    # Axis 1: the better one; axis 2: the worse one.
    decided = mask[:, :, None] & mask[:, None, :] & (scores[:, :, None] > scores[:, None, :])
    chosen, rejected = wide[:, :, None], wide[:, None, :]
    return PairCounts(
        num_pairs=decided.double().sum(),
        num_correct=torch.where(decided, correct(chosen, rejected).double(), 0).sum(),
        sum_margin=torch.where(decided, chosen - rejected, 0).sum(),
    )


def _pair_losses(
    rewards: Tensor, labels: Labels, pairs: Tensor, config: LossConfig, has_ties: bool
) -> Tensor:
    """The losses of the comparisons that are `pairs`, (C,) bool."""
    best = labels.starts[:-1][pairs]
    chosen, rejected = rewards[best], rewards[best + 1]
    tied = labels.scores[best] == labels.scores[best + 1]
    margin = labels.margins[pairs] if config.use_margin else None
    smoothing = config.label_smoothing
    if has_ties:
        of_ties = rao_kupper if config.ties == "rao_kupper" else davidson
        return of_ties(chosen, rejected, tied, config.tie_parameter, margin, smoothing)
    of_pairs = log_exp if config.kind == "log_exp" else bradley_terry
    # A model that knows no ties sees a toss-up in one. Training sets with ties never come here.
    toss_up = bradley_terry(chosen, rejected, label_smoothing=0.5)
    return torch.where(tied, toss_up, of_pairs(chosen, rejected, margin, smoothing))


def _rows(labels: Labels) -> tuple[Tensor, Tensor]:
    """(C, K) the sequences of each comparison, padded with sequence 0; (C, K) bool: which are."""
    sizes = labels.starts.diff()
    width = int(sizes.max()) if len(sizes) else 1
    column = torch.arange(width, device=sizes.device)
    mask = column < sizes[:, None]
    return torch.where(mask, labels.starts[:-1, None] + column, 0), mask
