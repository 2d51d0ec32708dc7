"""What becomes of rewards before a policy is trained on them: functions over arrays of rewards.

NaN (or None, in a list) is a completion without a reward. It stays NaN, and no mean or deviation
counts it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

STD_FLOOR = 1e-4
"""Added to a standard deviation before it divides, as TRL's trainers do."""


def clipped(rewards: ArrayLike, low: float = -np.inf, high: float = np.inf) -> Array:
    """Rewards of any shape between two bounds (OpenRLHF's `--reward_clip_range`). Raises ValueError
    for bounds that cross."""
    if not low <= high:
        raise ValueError(f"low is {low} and high is {high}; low must be at most high")
    return np.clip(_array(rewards), low, high)


def overlong_penalty(num_tokens: ArrayLike, max_tokens: int, buffer_tokens: int) -> Array:
    """What is added to the rewards of completions by their lengths (any shape): 0 up to
    `max_tokens - buffer_tokens`, from there a straight line to -1 at `max_tokens`, and -1 beyond.

    The soft overlong punishment of DAPO (Yu et al. 2025, arXiv 2503.14476, eq. 13); multiply it by
    the weight that it shall have. Raises ValueError for a buffer that is not within `max_tokens`.
    """
    if not 0 < buffer_tokens <= max_tokens:
        raise ValueError(f"buffer_tokens is {buffer_tokens}; it must be in 1..{max_tokens}")
    over = _array(num_tokens) - (max_tokens - buffer_tokens)
    return -np.clip(over / buffer_tokens, 0.0, 1.0)


def missing_eos_penalty(
    rewards: ArrayLike, ended_with_eos: ArrayLike, penalty: float = 1.0
) -> Array:
    """Rewards minus `penalty` where a completion was cut instead of ended, both of one shape.

    As TRL's trainers take `missing_eos_penalty` off. Raises ValueError for a penalty below 0.
    """
    if penalty < 0:
        raise ValueError(f"penalty is {penalty}; it is taken off, so it must be at least 0")
    return _array(rewards) - penalty * ~np.asarray(ended_with_eos, bool)


def weighted_sum(
    rewards: Mapping[str, ArrayLike], weights: Mapping[str, float] | None = None
) -> Array:
    """Named rewards of one shape as one; a weight that is not given is 1.

    A reward that is missing counts as 0 where another of its completion is there, and the sum is
    missing where all are, as in TRL's GRPOTrainer. Raises ValueError for names of weights that no
    reward has.
    """
    stacked, scale = _stacked(rewards, weights)
    return _nansum(scale * stacked)


def group_advantages(rewards: ArrayLike | Sequence[float | None], *, over_std: bool) -> Array:
    """Rewards (groups, completions) minus their group's mean, which is Dr. GRPO's advantage (Liu et
    al. 2025, arXiv 2503.20783); over their standard deviation (with n - 1) too, it is GRPO's (Shao
    et al. 2024, arXiv 2402.03300, 4.1.2)."""
    table = _array(rewards)
    known = ~np.isnan(table)
    count = known.sum(axis=-1, keepdims=True)
    mean = np.nansum(table, axis=-1, keepdims=True) / np.maximum(count, 1)
    centred: Array = table - mean
    if not over_std:
        return centred
    variance = np.nansum(centred**2, axis=-1, keepdims=True) / np.maximum(count - 1, 1)
    normalized: Array = centred / (np.sqrt(variance) + STD_FLOOR)
    return normalized


def decoupled_advantages(
    rewards: Mapping[str, ArrayLike], weights: Mapping[str, float] | None = None
) -> Array:
    """Named rewards (groups, completions) to advantages of the same shape: each reward's advantage
    within its group, their weighted sum, and that over the whole batch's deviation from its mean.

    GDPO (Liu et al. 2026, arXiv 2601.05242): a weighted sum of rewards, normalized afterwards,
    gives different combinations of rewards the same advantage. TRL calls it "normalize_then_sum".
    Raises as `weighted_sum` does.
    """
    each = {name: group_advantages(table, over_std=True) for name, table in rewards.items()}
    total = weighted_sum(each, weights)
    return group_advantages(total.reshape(1, -1), over_std=True).reshape(total.shape)


def _array(values: ArrayLike | Sequence[float | None]) -> Array:
    return np.asarray(values, np.float64)  # None becomes NaN


def _stacked(
    rewards: Mapping[str, ArrayLike], weights: Mapping[str, float] | None
) -> tuple[Array, Array]:
    """(rewards, ...), and their weights, which broadcast to it."""
    if not rewards:
        raise ValueError("no rewards are given")
    if unknown := sorted((weights or {}).keys() - rewards.keys()):
        raise ValueError(f"weights has {unknown[0]!r}; the rewards are {', '.join(rewards)}")
    stacked = np.stack([_array(values) for values in rewards.values()])
    scale = _array([(weights or {}).get(name, 1.0) for name in rewards])
    return stacked, scale.reshape(-1, *[1] * (stacked.ndim - 1))


def _nansum(stacked: Array) -> Array:
    """Over the first axis; NaN where all are."""
    is_missing = np.isnan(stacked).all(axis=0)
    return np.where(is_missing, np.nan, np.nansum(stacked, axis=0))
