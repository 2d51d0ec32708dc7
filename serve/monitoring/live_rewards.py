"""Sums over the live rewards of one model version: additive, forgetting, of constant size. No Ray.

`LiveRewards` of two streams add up to those of both, whatever the order, so that every ingress
keeps its own and all of them together answer for the service. NumPy only.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from reward_actor.contract import HeldOut

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

_MAX_BINS = 64
# Narrower bins than 2**-20 tell nothing of a float32 score; wider ones by 2**-50 fit an int64.
_MIN_EXPONENT = -20
_INDEX_BITS = 50
# Of the width of the held-out distribution: the same sample scores that close in another batch.
_ROUNDING = 1e-4
# Of the squared mean: a smaller variance is rounding.
_MIN_VARIANCE = 1e-14


@dataclass(frozen=True)
class Histogram:
    """Weights of bins of width 2**exponent: bin i of `weights` begins at (first + i) * width.

    The width is the smallest power of two with which everything so far fits into 64 bins, so it
    depends on what was seen and not on its order, and two histograms always have common bins.
    """

    exponent: int
    first: int
    weights: list[float]

    @classmethod
    def of(cls, values: Floats) -> Histogram:
        largest = float(np.abs(values).max(initial=0.0))
        exponent = max(_MIN_EXPONENT, math.frexp(largest)[1] - _INDEX_BITS)
        low, high = float(values.min()), float(values.max())
        while _bin_of(high, exponent) - _bin_of(low, exponent) >= _MAX_BINS:
            exponent += 1
        index = np.floor(np.ldexp(values, -exponent)).astype(np.int64)
        first = int(index.min())
        return cls(exponent, first, np.bincount(index - first).astype(float).tolist())

    def over(self, exponent: int, first: int, num_bins: int) -> Floats:
        """The weights in bins that are as wide or wider, and hold all of this."""
        steps = exponent - self.exponent
        index = (np.arange(self.first, self.first + len(self.weights)) >> steps) - first
        weights: Floats = np.bincount(index, self.weights, minlength=num_bins).astype(np.float64)
        return weights

    def span(self, exponent: int) -> tuple[int, int]:
        """The first and the last bin of width 2**exponent that this reaches into."""
        steps = exponent - self.exponent
        return self.first >> steps, (self.first + len(self.weights) - 1) >> steps

    def without_weight(self) -> Histogram:
        """The same bins, empty."""
        return replace(self, weights=[0.0] * len(self.weights))

    def __add__(self, other: Histogram) -> Histogram:
        exponent = max(self.exponent, other.exponent)
        while True:
            spans = [self.span(exponent), other.span(exponent)]
            first, last = min(a for a, _ in spans), max(b for _, b in spans)
            if last - first < _MAX_BINS:
                break
            exponent += 1
        num_bins = last - first + 1
        weights = self.over(exponent, first, num_bins) + other.over(exponent, first, num_bins)
        return Histogram(exponent, first, weights.tolist())


def _bin_of(value: float, exponent: int) -> int:
    return math.floor(math.ldexp(value, -exponent))


class Reference:
    """The held-out distribution of one model version, as rewards.

    cuts (B - 1,) divide it into B bins of like shares: ten, or fewer where many scores are equal.
    """

    def __init__(self, held_out: HeldOut, mean: float, std: float) -> None:
        self.quantiles: Floats = (np.array(held_out.quantiles) - mean) / std
        self.length_correlation = held_out.length_correlation
        self.num_scores = held_out.num_scores
        low, high = self.quantiles[1], self.quantiles[99]
        rounding = _ROUNDING * (high - low)
        self.low, self.high = low - rounding, high + rounding
        self.cuts: Floats = np.unique(self.quantiles[10:100:10]) + rounding
        below = np.searchsorted(self.quantiles, self.cuts, side="right") - 1
        levels = np.concatenate([[0.0], below / 100, [1.0]])
        self.shares: Floats = np.diff(levels)

    def bins(self, rewards: Floats) -> list[float]:
        """How many of the rewards lie in each of the B bins."""
        found = np.bincount(np.searchsorted(self.cuts, rewards), minlength=len(self.cuts) + 1)
        counts: list[float] = found.astype(float).tolist()
        return counts

    def num_outside(self, rewards: Floats) -> int:
        """Of the rewards, those outside what 98 % of the held-out ones lie in."""
        return int(((rewards < self.low) | (rewards > self.high)).sum())

    def over(self, edges: Floats) -> Floats:
        """The shares of the held-out rewards between edges that hold them all."""
        levels = np.linspace(0.0, 1.0, len(self.quantiles))
        return np.diff(np.interp(edges, self.quantiles, levels, left=0.0, right=1.0))


@dataclass(frozen=True)
class LiveRewards:
    """What is known of rewards x and their sequences' numbers of tokens n; weights forget.

    num_rewards     all that there ever were.
    weight          of those that count still: sum of w.
    group_weight    the same of their groups; samples of one group are much alike.
    mean, tokens    weighted means of x and n.
    squares, token_squares, products
                    sums of w (x - mean)^2, w (n - tokens)^2 and w (x - mean) (n - tokens).
    bins            weights between the reference's cuts; empty without one.
    outside         weight outside what 98 % of the held-out rewards lie in.
    """

    num_rewards: int
    weight: float
    group_weight: float
    mean: float
    tokens: float
    squares: float
    token_squares: float
    products: float
    bins: list[float]
    outside: float
    histogram: Histogram

    @classmethod
    def of(
        cls, rewards: Floats, num_tokens: Floats, num_groups: int, reference: Reference | None
    ) -> LiveRewards:
        """Those of at least one reward."""
        x, n = rewards - rewards.mean(), num_tokens - num_tokens.mean()
        return cls(
            num_rewards=len(rewards),
            weight=float(len(rewards)),
            group_weight=float(num_groups),
            mean=float(rewards.mean()),
            tokens=float(num_tokens.mean()),
            squares=float(x @ x),
            token_squares=float(n @ n),
            products=float(x @ n),
            bins=[] if reference is None else reference.bins(rewards),
            outside=0.0 if reference is None else float(reference.num_outside(rewards)),
            histogram=Histogram.of(rewards),
        )

    def __add__(self, other: LiveRewards) -> LiveRewards:
        weight = self.weight + other.weight
        share = other.weight / weight
        between = self.weight * share
        x, n = other.mean - self.mean, other.tokens - self.tokens
        return LiveRewards(
            num_rewards=self.num_rewards + other.num_rewards,
            weight=weight,
            group_weight=self.group_weight + other.group_weight,
            mean=self.mean + x * share,
            tokens=self.tokens + n * share,
            squares=self.squares + other.squares + between * x * x,
            token_squares=self.token_squares + other.token_squares + between * n * n,
            products=self.products + other.products + between * x * n,
            bins=[a + b for a, b in zip(self.bins, other.bins, strict=True)],
            outside=self.outside + other.outside,
            histogram=self.histogram + other.histogram,
        )

    def faded(self, factor: float) -> LiveRewards:
        """The same with every weight times `factor`."""
        return replace(
            self,
            weight=factor * self.weight,
            group_weight=factor * self.group_weight,
            squares=factor * self.squares,
            token_squares=factor * self.token_squares,
            products=factor * self.products,
            bins=[factor * weight for weight in self.bins],
            outside=factor * self.outside,
            histogram=replace(
                self.histogram, weights=[factor * weight for weight in self.histogram.weights]
            ),
        )

    @property
    def std(self) -> float:
        return math.sqrt(self.squares / self.weight)

    @property
    def length_correlation(self) -> float | None:
        """Pearson's, of reward and number of tokens; None while one of them does not vary."""
        least = _MIN_VARIANCE * self.weight
        if self.squares <= least * self.mean**2 or self.token_squares <= least * self.tokens**2:
            return None
        found = self.products / math.sqrt(self.squares * self.token_squares)
        return max(-1.0, min(1.0, found))


def dump(live: dict[str, LiveRewards]) -> dict[str, Any]:
    """Live rewards by model version, as ingresses tell them to each other in JSON."""
    return {version: asdict(found) for version, found in live.items()}


def load(data: dict[str, Any]) -> dict[str, LiveRewards]:
    return {
        version: LiveRewards(**{**found, "histogram": Histogram(**found["histogram"])})
        for version, found in data.items()
    }
