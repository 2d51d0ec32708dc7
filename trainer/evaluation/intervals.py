"""How far a held-out mean may be from that of other prompts. NumPy only.

Pairs about one prompt are no independent evidence, so prompts are what is resampled.
Shapes: P pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

NUM_RESAMPLES = 1000
_TAIL = 0.025  # of a 95 % interval, on each side
NORMAL = 1.96
"""Standard errors from the mean to an end of a 95 % interval, for a normal distribution."""


@dataclass(frozen=True)
class Estimate:
    """A mean over pairs with its 95 % interval and standard error, both resampled by prompt."""

    mean: float
    low: float
    high: float
    stderr: float
    num_prompts: int

    @property
    def sign(self) -> int:
        """1 or -1 where the interval says which, 0 where it holds 0."""
        return int(self.low > 0) - int(self.high < 0)


def estimate(
    values: NDArray[np.float64],
    prompts: NDArray[np.int64],
    between: tuple[float, float] = (0.0, 1.0),
    seed: int = 0,
) -> Estimate:
    """The mean of (P,) values of pairs about (P,) prompts, none of them outside `between`.

    The interval is the percentile bootstrap's over prompts, which own whole sets of pairs (Efron
    and Tibshirani, 1993, chapters 8 and 13). Of few prompts, or nearly equal ones, that is too
    narrow: other prompts may be of a kind that was not seen. A share q of them, with (1 - q)^n =
    2.5 % for n prompts, may lie at an end of `between`, and the interval reaches as far as that
    at least. Of all right, or none, it is then the exact one of Clopper and Pearson (Biometrika
    26, 1934), and the standard error is taken from its width.
    """
    _, owner, num_pairs = np.unique(prompts, return_inverse=True, return_counts=True)
    sums = np.bincount(owner, weights=values)
    num_prompts = len(num_pairs)
    mean = float(np.sort(values).sum()) / len(values)
    unseen = 1 - _TAIL ** (1 / num_prompts)
    low, high = (mean + unseen * (end - mean) for end in between)
    if (sums * num_pairs[0] == sums[0] * num_pairs).all():  # every resample is the same
        return Estimate(mean, low, high, (high - low) / (2 * NORMAL), num_prompts)
    # Prompts with as many pairs and as large a sum are alike, so a resample is one draw of how
    # often each kind comes up: the same distribution as drawing the prompts one by one.
    kinds, counts = np.unique(np.stack([num_pairs, sums]), axis=1, return_counts=True)
    random = np.random.Generator(np.random.PCG64(seed))
    drawn = random.multinomial(num_prompts, counts / num_prompts, size=NUM_RESAMPLES)
    means = (drawn @ kinds[1]) / (drawn @ kinds[0])
    ends = np.percentile(means, (100 * _TAIL, 100 * (1 - _TAIL)))
    return Estimate(
        mean, min(low, float(ends[0])), max(high, float(ends[1])), float(means.std()), num_prompts
    )
