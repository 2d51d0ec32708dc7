"""Reward monitoring: sums that add up, distributions that compare, warnings that mean something."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reward_actor.contract import HeldOut
from reward_actor.schema import MonitoredModel
from serve.config import ServeConfig
from serve.monitoring.live_rewards import Histogram, LiveRewards, Reference, dump, load
from serve.monitoring.monitor import Monitor, stability_index

CONFIG = ServeConfig(model="unused")
LEVELS = np.linspace(0, 1, 101)
rewards = st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=40)


def reference(scores: np.ndarray, correlation: float | None = None) -> Reference:
    """That of a model with these held-out rewards."""
    quantiles = np.quantile(scores, LEVELS).tolist()
    return Reference(HeldOut(quantiles, correlation, len(scores)), mean=0.0, std=1.0)


def normal(seed: int, count: int = 2000) -> np.ndarray:
    return np.random.default_rng(seed).normal(0.3, 2.0, count)


def live_of(values: list[float], against: Reference | None) -> LiveRewards:
    lengths = np.arange(len(values)) % 7.0
    return LiveRewards.of(np.array(values), lengths, len(values), against)


def assert_same(ours: LiveRewards, theirs: LiveRewards) -> None:
    assert ours.num_rewards == theirs.num_rewards
    assert ours.histogram.exponent == theirs.histogram.exponent
    assert ours.histogram.first == theirs.histogram.first
    assert ours.histogram.weights == pytest.approx(theirs.histogram.weights)
    assert ours.bins == pytest.approx(theirs.bins)
    scale = max(1.0, abs(theirs.mean), theirs.std)
    assert ours.mean == pytest.approx(theirs.mean, abs=1e-9 * scale)
    assert ours.std == pytest.approx(theirs.std, abs=1e-6 * scale)
    for name in ("weight", "group_weight", "tokens", "outside"):
        assert getattr(ours, name) == pytest.approx(getattr(theirs, name)), name
    squared = scale**2 * theirs.weight
    assert ours.squares == pytest.approx(theirs.squares, abs=1e-9 * squared)
    assert ours.products == pytest.approx(theirs.products, abs=1e-9 * scale * theirs.weight * 10)


@given(st.lists(rewards, min_size=1, max_size=5), st.booleans(), st.randoms())
def test_parts_in_any_order_add_up_to_the_whole(
    parts: list[list[float]], known: bool, order: object
) -> None:
    against = reference(normal(0)) if known else None
    lengths = [np.random.default_rng(len(part)).integers(1, 500, len(part)) for part in parts]
    pairs = [
        LiveRewards.of(np.array(part), of_part.astype(float), len(part), against)
        for part, of_part in zip(parts, lengths, strict=True)
    ]
    whole = LiveRewards.of(
        np.concatenate([np.array(part) for part in parts]),
        np.concatenate(lengths).astype(float),
        sum(map(len, parts)),
        against,
    )
    order.shuffle(pairs)  # type: ignore[attr-defined]
    assert_same(sum(pairs[1:], pairs[0]), whole)


@given(rewards)
def test_live_rewards_survive_their_way_to_another_ingress(values: list[float]) -> None:
    live = {"sha256:0": live_of(values, reference(normal(0)))}
    assert load(json.loads(json.dumps(dump(live)))) == live


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=1))
def test_a_histogram_holds_every_finite_reward(values: list[float]) -> None:
    histogram = Histogram.of(np.array(values))
    assert sum(histogram.weights) == len(values)
    assert len(histogram.weights) <= 64
    width = 2.0**histogram.exponent
    assert histogram.first * width <= min(values)
    assert max(values) < (histogram.first + len(histogram.weights)) * width


@given(st.integers(0, 10_000), st.integers(2, 20))
def test_equal_distributions_do_not_drift(seed: int, num_bins: int) -> None:
    shares = np.random.default_rng(seed).dirichlet(np.ones(num_bins))
    assert stability_index(shares, shares) == pytest.approx(0)
    other = np.random.default_rng(seed + 1).dirichlet(np.ones(num_bins))
    assert stability_index(shares, other) == pytest.approx(stability_index(other, shares))
    assert stability_index(shares, other) > 0


@given(st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0]), min_size=101, max_size=101))
def test_the_held_out_scores_themselves_do_not_drift(scores: list[float]) -> None:
    """Not even where many are equal, and no decile divides them evenly."""
    against = reference(np.array(scores))
    live = live_of(sorted(scores), against)
    assert sum(against.shares) == pytest.approx(1)
    assert stability_index(np.array(live.bins) / live.weight, against.shares) < 0.02
    assert live.outside <= 2


def model_of(
    against: Reference | None,
    values: np.ndarray,
    lengths: np.ndarray,
    group: int = 1,
    config: ServeConfig = CONFIG,
) -> MonitoredModel:
    """What is said after these rewards came in groups of so many."""
    monitor = Monitor(config)
    monitor.serve("v", against)
    for start in range(0, len(values), group):
        end = start + group
        monitor.add("v", values[start:end].tolist(), lengths[start:end].tolist())
        if start % 256 == 0:
            monitor.live()
    [model] = monitor.reply().models
    return model


def types(model: MonitoredModel) -> set[str]:
    return {warning.type for warning in model.warnings}


@pytest.mark.parametrize("num_held_out", [40, 400, 4000])
@pytest.mark.parametrize("group", [1, 16])
def test_a_stationary_stream_is_never_warned_about(num_held_out: int, group: int) -> None:
    """Also where held-out data are few, and where a group's rewards are much alike."""
    for seed in range(60):
        drawn = np.random.default_rng(seed)
        values = np.repeat(drawn.normal(0, 1, 4000 // group), group)
        values += drawn.normal(0, 0.1, len(values))
        held_out = reference(drawn.normal(0, 1.005, num_held_out), correlation=0.1)
        lengths = drawn.integers(20, 500, len(values))
        for count in (500, 1000, 4000):
            model = model_of(held_out, values[:count], lengths[:count], group)
            assert model.warnings == [], (seed, count, model)


@given(st.integers(0, 10_000), st.floats(-3, 3), st.floats(0.1, 4))
@settings(max_examples=20, deadline=None)
def test_a_shifted_stream_is_warned_about(seed: int, mean: float, std: float) -> None:
    shift = 1.2 * std * (1 if seed % 2 else -1)
    drawn = np.random.default_rng(seed)
    held_out = reference(drawn.normal(mean, std, 1000))
    lengths = drawn.integers(20, 500, 1000)
    model = model_of(held_out, drawn.normal(mean + shift, std, 1000), lengths)
    assert "drift" in types(model)
    assert model.drift is not None
    assert model.drift > 0.25


@given(st.integers(0, 10_000), st.booleans())
@settings(max_examples=20, deadline=None)
def test_a_stream_that_follows_its_length_is_warned_about(seed: int, known: bool) -> None:
    drawn = np.random.default_rng(seed)
    lengths = drawn.integers(20, 500, 1000)
    values = 0.9 * (lengths - lengths.mean()) / lengths.std() + drawn.normal(0, 0.4, 1000)
    held_out = reference(drawn.normal(0, 1, 1000), correlation=0.2) if known else None
    model = model_of(held_out, values, lengths)
    assert types(model) == {"length"}
    assert model.length_correlation == pytest.approx(np.corrcoef(values, lengths)[0, 1], abs=0.02)
    again = Reference(HeldOut(np.quantile(values, LEVELS).tolist(), 0.95, 1000), 0.0, 1.0)
    assert types(model_of(again, values, lengths)) == set()  # the model has always done so


def test_rewards_at_the_extremes_are_warned_about() -> None:
    values, lengths = normal(1, 1000), np.ones(1000, int)
    values[::5] = values.max() + 1
    model = model_of(reference(normal(2)), values, lengths)
    assert "extremes" in types(model)
    assert model.share_at_extremes == pytest.approx(0.2, abs=0.03)


def test_the_past_is_forgotten() -> None:
    config = CONFIG.model_copy(update={"monitor_half_life": 1000})
    good, bad = normal(3, 10_000), normal(4, 6_000) + 3
    values = np.concatenate([good, bad])
    model = model_of(reference(normal(5)), values, np.ones(len(values), int), config=config)
    assert model.num_rewards == 16_000
    assert model.mean == pytest.approx(bad.mean(), abs=0.3)
    assert "drift" in types(model)
    again = np.concatenate([bad, good])
    model = model_of(reference(normal(5)), again, np.ones(len(again), int), config=config)
    assert model.warnings == []


def test_nothing_is_said_too_early() -> None:
    values, lengths = normal(6, 600) + 50, np.ones(600, int)
    early = model_of(reference(normal(7)), values[:499], lengths[:499])
    assert early.warnings == []
    assert early.drift is not None
    assert types(model_of(reference(normal(7)), values, lengths)) == {"drift", "extremes"}


def test_several_ingresses_answer_as_one_would() -> None:
    config = CONFIG.model_copy(update={"num_ingress": 2, "monitor_half_life": 4000})
    values, lengths = normal(8, 8000), np.random.default_rng(9).integers(1, 99, 8000)
    against = reference(normal(10))
    one = model_of(against, values, lengths, config=config.model_copy(update={"num_ingress": 1}))
    monitors = [Monitor(config), Monitor(config)]
    for index, monitor in enumerate(monitors):
        monitor.serve("v", against)
        for reward, length in zip(values[index::2], lengths[index::2], strict=True):
            monitor.add("v", [float(reward)], [int(length)])
            monitor.live()
    a, b = monitors
    [ours] = a.reply([b.live()]).models
    [theirs] = b.reply([load(dump(a.live()))]).models
    assert ours.live is not None
    assert theirs.live is not None
    assert ours.live.edges == theirs.live.edges
    assert ours.live.shares == pytest.approx(theirs.live.shares)
    assert ours.num_rewards == one.num_rewards == 8000
    for name in ("mean", "std", "drift", "length_correlation", "share_at_extremes"):
        assert getattr(ours, name) == pytest.approx(getattr(theirs, name), abs=1e-9), name
        assert getattr(ours, name) == pytest.approx(getattr(one, name), abs=0.05), name


def test_versions_are_told_apart_and_the_served_one_comes_first() -> None:
    monitor = Monitor(CONFIG)
    for number in range(6):
        monitor.serve(f"v{number}", None)
        monitor.add(f"v{number}", [float(number), None], [3, 4])
    monitor.serve("v3", None)
    monitor.add("v0", [1.0], [1])  # long forgotten
    models = monitor.reply().models
    assert [model.model_version for model in models] == ["v3", "v5", "v4", "v2"]
    assert [model.mean for model in models] == [3.0, 5.0, 4.0, 2.0]
    assert [model.num_rewards for model in models] == [1, 1, 1, 1]
    assert monitor.knows("v3")


def test_the_two_distributions_share_their_edges() -> None:
    model = model_of(reference(normal(11)), normal(12) + 1, np.ones(2000, int))
    assert model.live is not None
    assert model.held_out is not None
    assert model.live.edges == model.held_out.edges
    assert len(model.live.edges) == len(model.live.shares) + 1
    for shares in (model.live.shares, model.held_out.shares):
        assert sum(shares) == pytest.approx(1)
    alone = model_of(None, normal(12), np.ones(2000, int))
    assert alone.held_out is None
    assert alone.drift is None


def test_a_reward_that_never_changes_correlates_with_nothing() -> None:
    lengths = np.random.default_rng(13).integers(1, 99, 600)
    model = model_of(None, np.full(600, 0.1), lengths)
    assert model.length_correlation is None
    assert model.std == pytest.approx(0)
    assert model.warnings == []
