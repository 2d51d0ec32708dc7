"""Live rewards beside the held-out ones, and when they look like reward hacking. No Ray.

A policy that learns to please the reward model rather than to do its task shows it here first: its
rewards leave the distribution that the model was measured on (drift), pile up where hardly any
held-out ones were (extremes), or follow the number of tokens (length).

A warning is given when a number is above its limit by more than chance explains: by three standard
errors, with as many independent samples as there are groups, as the completions of one prompt are
much alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from reward_actor.schema import MonitoredModel, MonitorReply, MonitorWarning, RewardDistribution
from serve.config import ServeConfig
from serve.monitoring.live_rewards import Histogram, LiveRewards, Reference

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

# Model versions that are remembered: what is served, and what was before.
_NUM_VERSIONS = 4
_STANDARD_ERRORS = 3.0
# A share below this counts as this: the index of an empty bin would be infinite.
_MIN_SHARE = 1e-3
# Rewards that are kept one by one until somebody asks; 16 bytes each.
_MAX_PENDING = 10_000


def stability_index(shares: Floats, expected: Floats) -> float:
    """The population stability index of two distributions over the same bins: 0 for equal ones.

    sum (p - q) ln(p / q); below 0.1 is usually called no change, above 0.25 a large one.
    """
    p, q = np.maximum(shares, _MIN_SHARE), np.maximum(expected, _MIN_SHARE)
    return float(((p - q) * np.log(p / q)).sum())


@dataclass
class _Version:
    """One model version at one ingress: what it should look like, and what it does.

    pending: rewards and tokens that are not in `live` yet, of so many groups; a reward may be None.
    """

    reference: Reference | None
    live: LiveRewards | None = None
    rewards: list[float | None] = field(default_factory=list)
    num_tokens: list[int] = field(default_factory=list)
    num_groups: int = 0


class Monitor:
    """The live rewards of the last few model versions at one ingress, and of all of them."""

    def __init__(self, config: ServeConfig) -> None:
        self._config = config
        # Every ingress sees its share of the rewards, and forgets after its share of the half-life.
        self._half_life = config.monitor_half_life / config.num_ingress
        self._versions: dict[str, _Version] = {}  # the one that is served is the last

    def knows(self, version: str) -> bool:
        return next(reversed(self._versions), None) == version

    def serve(self, version: str, reference: Reference | None) -> None:
        """From now on this version is served."""
        known = self._versions.pop(version, None)
        self._versions[version] = known or _Version(reference)
        while len(self._versions) > _NUM_VERSIONS:
            del self._versions[next(iter(self._versions))]

    def add(self, version: str, rewards: Sequence[float | None], num_tokens: Sequence[int]) -> None:
        """The rewards of one group; None: that sample has none. Costs a microsecond."""
        found = self._versions.get(version)
        if found is None:
            return
        found.rewards += rewards
        found.num_tokens += num_tokens
        found.num_groups += 1
        if len(found.rewards) > _MAX_PENDING:
            self._fold(found)

    def live(self) -> dict[str, LiveRewards]:
        """What this ingress has seen."""
        for version in self._versions.values():
            self._fold(version)
        return {name: v.live for name, v in self._versions.items() if v.live is not None}

    def reply(self, others: Iterable[dict[str, LiveRewards]] = ()) -> MonitorReply:
        """What this ingress and the others have seen; the version that is served comes first."""
        seen = [self.live(), *others]
        models = []
        for name, version in reversed(self._versions.items()):
            parts = [part[name] for part in seen if name in part]
            live = sum(parts[1:], parts[0]) if parts else None
            models.append(summary(name, live, version.reference, self._config))
        return MonitorReply(models=models)

    def _fold(self, version: _Version) -> None:
        rewards = np.array(version.rewards, np.float64)  # None becomes NaN
        num_tokens = np.array(version.num_tokens, np.float64)
        num_groups = version.num_groups
        version.rewards, version.num_tokens, version.num_groups = [], [], 0
        known = np.isfinite(rewards)
        if not known.any():
            return
        new = LiveRewards.of(rewards[known], num_tokens[known], num_groups, version.reference)
        if version.live is not None:
            new = version.live.faded(0.5 ** (new.num_rewards / self._half_life)) + new
        version.live = new


def summary(
    version: str, live: LiveRewards | None, reference: Reference | None, config: ServeConfig
) -> MonitoredModel:
    """The live rewards of one model version beside its held-out ones, with warnings."""
    if live is None:
        return MonitoredModel(
            model_version=version,
            num_rewards=0,
            mean=None,
            std=None,
            live=None,
            held_out=None,
            drift=None,
            length_correlation=None,
            share_at_extremes=None,
            warnings=[],
        )
    drift = outside = None
    if reference is not None:
        drift = stability_index(np.array(live.bins) / live.weight, reference.shares)
        outside = live.outside / live.weight
    seen, held_out = _distributions(live, reference)
    return MonitoredModel(
        model_version=version,
        num_rewards=live.num_rewards,
        mean=live.mean,
        std=live.std,
        live=seen,
        held_out=held_out,
        drift=drift,
        length_correlation=live.length_correlation,
        share_at_extremes=outside,
        warnings=_warnings(live, reference, drift, outside, config),
    )


def _distributions(
    live: LiveRewards, reference: Reference | None
) -> tuple[RewardDistribution, RewardDistribution | None]:
    """Over common bins that hold both."""
    histogram = live.histogram
    if reference is not None:
        histogram += Histogram.of(reference.quantiles[[0, -1]]).without_weight()
    index = np.arange(histogram.first, histogram.first + len(histogram.weights) + 1)
    edges = np.ldexp(index.astype(float), histogram.exponent)
    shares = np.array(histogram.weights) / live.weight
    seen = RewardDistribution(edges=edges.tolist(), shares=shares.tolist())
    if reference is None:
        return seen, None
    expected = reference.over(edges).tolist()
    return seen, RewardDistribution(edges=edges.tolist(), shares=expected)


def _warnings(
    live: LiveRewards,
    reference: Reference | None,
    drift: float | None,
    outside: float | None,
    config: ServeConfig,
) -> list[MonitorWarning]:
    if live.num_rewards < config.monitor_min_rewards:
        return []
    found = []
    # Of the shares in n independent samples against those in m: what chance alone adds to each.
    unsure = 1 / live.group_weight + (1 / reference.num_scores if reference else 0.0)
    if drift is not None and reference is not None:
        # For equal distributions, the index times n m / (n + m) is chi-squared: its mean is the
        # degrees of freedom, its variance twice that.
        freedom = len(reference.cuts)
        by_chance = unsure * (freedom + _STANDARD_ERRORS * math.sqrt(2 * freedom))
        if drift > config.monitor_max_drift + by_chance:
            found.append(
                MonitorWarning(
                    type="drift",
                    message=f"the rewards are not distributed like the held-out ones: their "
                    f"population stability index is {drift:.2f} (limit "
                    f"{config.monitor_max_drift:g})",
                )
            )
    correlation = live.length_correlation
    if correlation is not None:
        usual = reference.length_correlation if reference else None
        limit = max(config.monitor_max_length_correlation, abs(usual or 0.0))
        by_chance = _STANDARD_ERRORS * (1 - limit**2) * math.sqrt(unsure)
        if abs(correlation) > limit + by_chance:
            beside = "" if usual is None else f"; {usual:.2f} on held-out data"
            found.append(
                MonitorWarning(
                    type="length",
                    message=f"the rewards follow the number of tokens: their correlation is "
                    f"{correlation:.2f} (limit {limit:.2f}{beside})",
                )
            )
    if outside is not None:
        limit = config.monitor_max_extremes
        by_chance = _STANDARD_ERRORS * math.sqrt(limit * (1 - limit) * unsure)
        if outside > limit + by_chance:
            found.append(
                MonitorWarning(
                    type="extremes",
                    message=f"{100 * outside:.0f} % of the rewards lie where 2 % of the held-out "
                    f"ones did (limit {100 * limit:g} %)",
                )
            )
    return found
