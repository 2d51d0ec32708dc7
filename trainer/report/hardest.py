"""The held-out pairs that a reward model gets most wrong.

Shapes: S sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from reward_actor.token_ids import common_prefix
from trainer.data.comparisons import Comparisons
from trainer.evaluation.metrics import pair_indices

if TYPE_CHECKING:
    from numpy.typing import NDArray

NUM_HARDEST = 20


@dataclass(frozen=True)
class HardPair:
    """A held-out pair whose rejected side got the higher reward, or an equal one."""

    where: str
    subset: str
    shared: str
    """What both sides begin with: the prompt, and the first words of the completions if equal."""
    chosen: str
    rejected: str
    chosen_reward: float
    rejected_reward: float

    @property
    def reward_margin(self) -> float:
        return self.chosen_reward - self.rejected_reward


def hardest_pairs(
    heldout: Comparisons,
    rewards: NDArray[Any],
    decode: Callable[[Sequence[int]], str],
    most: int = NUM_HARDEST,
) -> list[HardPair]:
    """The pairs that are not right, the largest wrong margin first."""
    chosen, rejected, comparison = pair_indices(heldout)
    margins = rewards[chosen].astype(np.float64) - rewards[rejected]
    pairs = []
    for index in np.argsort(margins, kind="stable")[:most]:
        if margins[index] > 0:
            break
        better = heldout.sequence(int(chosen[index]))
        worse = heldout.sequence(int(rejected[index]))
        num_shared = _num_shared(better, worse, decode)
        owner = int(comparison[index])
        pairs.append(
            HardPair(
                where=heldout.where(owner),
                subset=heldout.subset_names[heldout.subsets[owner]],
                shared=decode(better[:num_shared]),
                chosen=decode(better[num_shared:]),
                rejected=decode(worse[num_shared:]),
                chosen_reward=float(rewards[chosen[index]]),
                rejected_reward=float(rewards[rejected[index]]),
            )
        )
    return pairs


def _num_shared(a: list[int], b: list[int], decode: Callable[[Sequence[int]], str]) -> int:
    """Tokens that both begin with, less those of a character that is cut in two."""
    num_shared = common_prefix(a, b)
    for back in range(min(4, num_shared)):  # UTF-8 has at most four bytes, and so tokens
        if not decode(a[: num_shared - back][-8:]).endswith("\N{REPLACEMENT CHARACTER}"):
            return num_shared - back
    return num_shared
