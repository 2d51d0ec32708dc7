"""How what the heads say becomes one reward: normalisation, then one number of several members.

A member is one head of one reward model; an ensemble has several. For members' rewards r_1 .. r_K:
  mean            sum_j r_j / K
  min             min_j r_j                 "worst-case optimisation"
  mean_minus_std  mean - k * spread         "uncertainty-weighted optimisation"
  weights         sum_j w_j r_j, where a model's contract has weights for its heads
where spread is their population standard deviation, sqrt(sum_j (r_j - mean)^2 / K). The two
pessimistic rules are those of Coste et al., Reward Model Ensembles Help Mitigate Overoptimization
(arXiv:2310.02743), but that theirs subtracts k times the variance: a deviation has the reward's
unit, so that k means the same whatever the rewards' scale.

Legend: K members; `...` any leading axes. All arithmetic is in float64.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from reward_actor.contract import Combine, ScoringContract, check_numbers, check_rule

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Reading:
    """What the raw scores (..., K) of a readout's members mean.

    members     (..., K), their rewards.
    rewards     (...), the rule applied to those.
    raw_scores  (...), the rule applied to the raw scores.
    spread      (...), the deviation of the members' rewards.
    finite      (...), whether all of these are.
    """

    members: Floats
    rewards: Floats
    raw_scores: Floats
    spread: Floats
    finite: NDArray[np.bool_]


@dataclass(frozen=True)
class Readout:
    """The members of a scorer, by name, how each is normalised, and how they are combined.

    Member j's reward is (raw score - means[j]) / stds[j]. With one member its reward is the reward,
    untouched by any rule; weights, one for each member, go before the rule.
    """

    names: list[str]
    means: list[float]
    stds: list[float]
    combine: Combine = "mean"
    k: float = 1.0
    weights: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_rule(self.combine, self.k)
        check_numbers("weights", self.weights, self.names)
        if not self.names or not len(self.names) == len(self.means) == len(self.stds):
            raise ValueError(
                f"{len(self.names)} names, {len(self.means)} means and {len(self.stds)} stds; "
                "every member needs one of each"
            )
        if twice := sorted({name for name in self.names if self.names.count(name) > 1}):
            raise ValueError(f"two members are named {twice[0]!r}; each needs a name of its own")
        if not all(std > 0 for std in self.stds):
            raise ValueError(f"stds is {self.stds}; each must be above 0")

    @classmethod
    def of(cls, contract: ScoringContract) -> Readout:
        """That of one reward model, by its contract."""
        num_heads = len(contract.heads)
        return cls(
            list(contract.heads),
            contract.head_means or [contract.mean] * num_heads,
            [contract.std] * num_heads,
            contract.combine,
            contract.combine_k,
            contract.head_weights,
        )

    def __len__(self) -> int:
        return len(self.names)

    @property
    def is_ensemble(self) -> bool:
        return len(self) > 1

    @property
    def named(self) -> list[str]:
        """The members whose rewards are reported, too, next to the one that they make."""
        return self.names if self.is_ensemble else []

    @property
    def normalisation(self) -> dict[str, float]:
        """The mean and std of every member; empty where they differ."""
        pairs = set(zip(self.means, self.stds, strict=True))
        return dict(zip(("mean", "std"), pairs.pop(), strict=True)) if len(pairs) == 1 else {}

    def read(self, raw_scores: NDArray[np.float32] | Floats) -> Reading:
        """(..., K) raw scores -> their meaning; what is not finite stays so, and is marked."""
        wide = np.asarray(raw_scores, np.float64)
        members = self.normalise(wide)
        rewards, raw, spread = self.combined(members), self.combined(wide), self.spread(members)
        every = np.concatenate([members, np.stack([rewards, raw, spread], axis=-1)], axis=-1)
        return Reading(members, rewards, raw, spread, np.isfinite(every).all(axis=-1))

    def normalise(self, raw_scores: NDArray[np.float32] | Floats) -> Floats:
        """(..., K) raw scores -> (..., K) rewards of the members."""
        assert raw_scores.shape[-1] == len(self), "one raw score of every member"
        with np.errstate(over="ignore", invalid="ignore"):
            wide = np.asarray(raw_scores, np.float64)
            rewards: Floats = (wide - np.array(self.means)) / np.array(self.stds)
        return rewards

    def combined(self, members: Floats) -> Floats:
        """(..., K) -> (...): one number of every K, by the rule."""
        with np.errstate(over="ignore", invalid="ignore"):
            if self.weights:
                one: Floats = (members * np.array(self.weights)).sum(axis=-1)
            elif not self.is_ensemble:
                one = members[..., 0]
            elif self.combine == "min":
                one = members.min(axis=-1)
            else:
                one = members.mean(axis=-1)
                if self.combine == "mean_minus_std":
                    one = one - self.k * self.spread(members)
        return one

    def spread(self, members: Floats) -> Floats:
        """(..., K) -> (...): the population standard deviation over the members; 0 for one."""
        with np.errstate(over="ignore", invalid="ignore"):
            spread: Floats = members.std(axis=-1)
        return spread
