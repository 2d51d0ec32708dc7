"""What a comparison costs, each formula with its source, and what a micro-batch of them costs.

All compute in float32, or in float64 where they are given it, and are finite for any difference.
Shapes: P pairs, R rankings of up to K completions (padded), C comparisons, S sequences, A
attributes; N tokens (rows of a packed forest), E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from trainer.config.train import LossConfig
    from trainer.data.comparisons import Comparisons


def bradley_terry(
    chosen: Tensor, rejected: Tensor, margin: Tensor | None = None, label_smoothing: float = 0.0
) -> Tensor:
    """(P,) rewards of both sides and optional (P,) margins -> (P,) losses.

    -log sigmoid(r_chosen - r_rejected - margin): the negative log-likelihood of the preference
    under Bradley and Terry (1952), as in InstructGPT (arXiv:2203.02155, eq. 1, K = 2) and with the
    margin of Llama 2 (arXiv:2307.09288, eq. 2).

    `label_smoothing` is the probability that an annotator swapped the sides. The loss is then its
    expectation, (1 - eps) L(chosen, rejected) + eps L(rejected, chosen), as in conservative DPO
    (Mitchell, 2023, "A note on DPO with noisy preferences"). Who swapped the sides meant the
    margin for the other one, so it is subtracted from the difference in both terms.
    """
    return _expected(lambda d: -F.logsigmoid(d), chosen, rejected, margin, label_smoothing)


def rao_kupper(
    chosen: Tensor,
    rejected: Tensor,
    tied: Tensor,
    log_theta: float,
    margin: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Rewards (P,), which pairs are ties (P,) bool, and log theta > 0 -> (P,) losses.

    With d = r_chosen - r_rejected, P(chosen) = sigmoid(d - log theta), P(rejected) =
    sigmoid(-d - log theta) and P(tie) = (theta^2 - 1) P(chosen) P(rejected), which add up to 1:
    Rao and Kupper (1967, "Ties in paired-comparison experiments", JASA 62). Rewards that differ by
    less than log theta are hard to tell apart. Margin and label smoothing, as in `bradley_terry`,
    are for decided pairs: a tie has no margin and stays a tie when its sides are swapped.
    """
    # log(theta^2 - 1), without overflow for a large theta or cancellation near 1.
    constant = 2 * log_theta + math.log(-math.expm1(-2 * log_theta))
    decided = _expected(
        lambda d: -F.logsigmoid(d - log_theta), chosen, rejected, margin, label_smoothing
    )
    d = _wide(chosen) - _wide(rejected)
    tie = -F.logsigmoid(d - log_theta) - F.logsigmoid(-d - log_theta) - constant
    return torch.where(tied, tie, decided)


def davidson(
    chosen: Tensor,
    rejected: Tensor,
    tied: Tensor,
    nu: float,
    margin: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Rewards (P,), which pairs are ties (P,) bool, and nu > 0 -> (P,) losses.

    P(chosen) : P(rejected) : P(tie) = exp(d/2) : exp(-d/2) : nu with d = r_chosen - r_rejected:
    Davidson (1970, "On extending the Bradley-Terry model to accommodate ties in paired comparison
    experiments", JASA 65). Margin and label smoothing are for decided pairs, as in `rao_kupper`.
    """
    log_nu = math.log(nu)

    def decided(d: Tensor) -> Tensor:
        return torch.stack([torch.zeros_like(d), -d, log_nu - d / 2]).logsumexp(0)

    d = _wide(chosen) - _wide(rejected)
    tie = torch.stack([d / 2, -d / 2, torch.full_like(d, log_nu)]).logsumexp(0) - log_nu
    return torch.where(tied, tie, _expected(decided, chosen, rejected, margin, label_smoothing))


def plackett_luce(rewards: Tensor, scores: Tensor, mask: Tensor) -> Tensor:
    """Rewards and scores (R, K), and which are not padding (R, K) bool -> (R,) losses.

    The negative log-likelihood of the ranking by falling scores: the best one is chosen among all
    with probability exp(r) / sum exp(r), then the next among the rest, and so on: Luce (1959),
    Plackett (1975, "The analysis of permutations"), for rewards arXiv:2301.11270.

    Of m completions with equal scores the l-th to go (from 0) has the denominator
    sum_lower exp(r) + (m - l)/m sum_equal exp(r): the approximation of Efron (1977, "The efficiency
    of Cox's likelihood function for censored data", JASA 72). It is exact where their rewards are
    equal; Breslow's (1974) has m/m, as if those that are gone still competed, and with few
    distinct scores (1 to 5 stars) it would press good completions down.

    The sum over the stages is not divided by their number: it is the log-likelihood of K - 1
    decisions, and each weighs as much as the one decision of a pair. K = 2 is `bradley_terry`.
    """
    rewards = _wide(rewards)
    # Axis 1: who is chosen at this stage; axis 2: among whom.
    among = mask[:, :, None] & mask[:, None, :]
    equal = among & (scores[:, :, None] == scores[:, None, :])
    lower = among & (scores[:, :, None] > scores[:, None, :])
    num_equal = equal.sum(-1).clamp(min=1).to(rewards.dtype)
    share = ((num_equal - equal.tril(-1).sum(-1)) / num_equal).log()

    # -log of exp(r) / (share exp(r) + sum_others) as log share + softplus(log_others - r - ...):
    # of differences only, so that it is precise however far all rewards are from 0.
    itself = torch.eye(rewards.shape[1], dtype=torch.bool, device=rewards.device)
    others = (equal | lower) & ~itself
    exponents = rewards[:, None, :] - rewards[:, :, None] - share[:, :, None] * lower
    exponents = exponents.masked_fill(~others, -math.inf)
    # logsumexp has no gradient where nothing is left to sum.
    last = ~others.any(-1)
    odds = exponents.masked_fill(last[:, :, None], 0).logsumexp(-1)
    return (share - F.logsigmoid(-odds)).masked_fill(last, 0).sum(-1)


def centering(rewards: Tensor, mask: Tensor) -> Tensor:
    """Rewards (R, K) and which are not padding (R, K) bool -> (R,) squares of twice the mean.

    For a pair (r_chosen + r_rejected)^2, as in TRL: it fixes the constant that preferences leave
    open (Eisenstein et al., arXiv:2312.09244). Of a ranking, too, only the mean is pulled to 0:
    a sum of squares over all its pairs would also pull its rewards together. 0 for a single one,
    which has no preference that would leave anything open.
    """
    num = mask.sum(-1)
    total = torch.where(mask, _wide(rewards), 0).sum(-1)
    return torch.where(num > 1, (2 * total / num.clamp(min=1)) ** 2, 0)


def attribute_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """(S, A) heads and (S, A) targets, NaN where unknown -> (S,) mean squares over the known ones.

    0 where none is known. Regression of attributes as in HelpSteer2 (arXiv:2406.08673) and ArmoRM
    (arXiv:2406.12845).
    """
    known = ~targets.isnan()
    # Before the subtraction: the gradient at a NaN is NaN, even where it is masked later.
    errors = torch.where(known, _wide(outputs) - torch.where(known, targets, 0), 0)
    return errors.square().sum(-1) / known.sum(-1).clamp(min=1)


def correct(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Rewards of both sides -> float32 of their shape: 1 where chosen wins, 1/2 for a tie, else 0.

    A tie is a coin toss; counting it as wrong would reward a model for noise.
    """
    return (chosen > rejected).float() + 0.5 * (chosen == rejected).float()


def _expected(
    loss: Callable[[Tensor], Tensor],
    chosen: Tensor,
    rejected: Tensor,
    margin: Tensor | None,
    label_smoothing: float,
) -> Tensor:
    """`loss` of the difference less the margin, expected over the sides having been swapped."""
    difference = _wide(chosen) - _wide(rejected)
    offset = torch.zeros_like(difference) if margin is None else _wide(margin)
    kept = loss(difference - offset)
    if not label_smoothing:
        return kept
    return (1 - label_smoothing) * kept + label_smoothing * loss(-difference - offset)


def _wide(values: Tensor) -> Tensor:
    """Float64 stays what it is; everything else becomes float32."""
    return values if values.dtype == torch.float64 else values.float()


def router_loss(router_logits: Sequence[Tensor], top_k: int, weights: Tensor) -> Tensor:
    """Each layer's (N, E) router logits and (N,) weights -> () loss: E * sum_e f_e P_e.

    f_e: routings to expert e per token; P_e: its mean probability; both over the tokens of all
    layers together. Switch Transformers (arXiv:2101.03961, eq. 4 to 6), generalised to `top_k`
    experts and pooled over the layers as `transformers` does it for Mixtral and Qwen3-MoE; its
    value is `top_k` when perfectly balanced. A weight says how many sequences share the token, so
    that a packed forest has the loss of its sequences laid out one by one; 0 leaves a token out,
    and without any weight the loss is 0. Computed in float32, or in float64 where given it.
    """
    routed, probability = [], []
    for logits in router_logits:
        wide = logits if logits.dtype == torch.float64 else logits.float()
        probabilities = wide.softmax(-1)
        experts = probabilities.topk(top_k, dim=-1).indices
        # One-hot sums, not scatter_add, which on CUDA adds up in any order.
        chosen = torch.zeros_like(probabilities).scatter(1, experts, 1.0)
        routed.append((chosen * weights[:, None]).sum(0))
        probability.append((probabilities * weights[:, None]).sum(0))
    total = len(router_logits) * weights.sum()
    total = torch.where(total > 0, total, 1)
    frequencies, means = torch.stack(routed).sum(0) / total, torch.stack(probability).sum(0) / total
    return len(frequencies) * (frequencies * means).sum()


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
    # A model that knows no ties sees a toss-up in one. Training sets with ties never come here.
    toss_up = bradley_terry(chosen, rejected, label_smoothing=0.5)
    return torch.where(tied, toss_up, bradley_terry(chosen, rejected, margin, smoothing))


def _rows(labels: Labels) -> tuple[Tensor, Tensor]:
    """(C, K) the sequences of each comparison, padded with sequence 0; (C, K) bool: which are."""
    sizes = labels.starts.diff()
    width = int(sizes.max()) if len(sizes) else 1
    column = torch.arange(width, device=sizes.device)
    mask = column < sizes[:, None]
    return torch.where(mask, labels.starts[:-1, None] + column, 0), mask
