"""How far a held-out mean may be from that of other prompts. NumPy only.

Pairs about one prompt are no independent evidence, so the prompts are what is resampled.
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
_NORMAL = 1.96  # standard errors from the mean to an end of it, where all is normal


@dataclass(frozen=True)
class Estimate:
    """A mean over pairs with its 95 % interval and its standard error, both of other prompts."""

    mean: float
    low: float
    high: float
    error: float
    num_prompts: int


def estimate(
    values: NDArray[np.float64],
    prompts: NDArray[np.int64],
    between: tuple[float, float] = (0.0, 1.0),
    seed: int = 0,
) -> Estimate:
    """The mean of (P,) values of pairs about (P,) prompts, none of them outside `between`.

    The interval is the percentile bootstrap's over prompts, which own whole sets of pairs (Efron
    and Tibshirani, 1993, chapters 8 and 13). Where all prompts have one mean every resample is the
    same. Then at most a share q of other prompts, (1 - q)^n = 2.5 % of n prompts, may be of any
    other value in `between`: of all right, or none, that is the exact interval of Clopper and
    Pearson (Biometrika 26, 1934).
    """
    num_pairs = np.bincount(prompts)
    sums = np.bincount(prompts, weights=values)[num_pairs > 0]
    num_pairs = num_pairs[num_pairs > 0]
    num_prompts = len(num_pairs)
    mean = float(np.sort(values).sum()) / len(values)
    if (sums * num_pairs[0] == sums[0] * num_pairs).all():
        others = 1 - _TAIL ** (1 / num_prompts)
        low, high = (mean + others * (end - mean) for end in between)
        return Estimate(mean, low, high, (high - low) / (2 * _NORMAL), num_prompts)
    # Prompts with as many pairs and as large a sum are alike, so a resample is one draw of how
    # often each kind comes up: the same distribution as drawing the prompts one by one.
    kinds, counts = np.unique(np.stack([num_pairs, sums]), axis=1, return_counts=True)
    random = np.random.Generator(np.random.PCG64(seed))
    drawn = random.multinomial(num_prompts, counts / num_prompts, size=NUM_RESAMPLES)
    means = (drawn @ kinds[1]) / (drawn @ kinds[0])
    low, high = np.percentile(means, (100 * _TAIL, 100 * (1 - _TAIL)))
    return Estimate(mean, float(low), float(high), float(means.std()), num_prompts)
