"""What a comparison costs, each formula with its source. Pure functions, none of them reduced.

All compute in float32, or in float64 where they are given it, and are finite for any difference.
Shapes: P pairs, R rankings of up to K completions (padded), S sequences, A attributes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

if TYPE_CHECKING:
    from torch import Tensor


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


def log_exp(
    chosen: Tensor, rejected: Tensor, margin: Tensor | None = None, label_smoothing: float = 0.0
) -> Tensor:
    """`bradley_terry` as OpenRLHF's LogExp writes it: log(1 + exp(r_rejected + margin - r_chosen)).

    Computed as log(exp(0) + exp(x)), whose terms are scaled by the larger one: without overflow.
    """
    return _expected(
        lambda d: torch.logaddexp(torch.zeros_like(d), -d),
        chosen, rejected, margin, label_smoothing,
    )  # fmt: skip


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
