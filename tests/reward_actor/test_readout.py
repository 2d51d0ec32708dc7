"""How several rewards become one: closed forms, bounds, and what is not finite."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward_actor.groups import SampleError, assemble
from reward_actor.readout import Readout

number = st.floats(-1e3, 1e3, width=32)
scale = st.floats(1e-2, 1e2)
ks = st.floats(0.0, 5.0)
rules = st.sampled_from(["mean", "min", "mean_minus_std"])


@st.composite
def ensembles(draw: st.DrawFn, least: int = 1) -> tuple[Readout, np.ndarray]:
    """A readout of 1 to 5 members, and the raw scores (n, K) of up to 4 samples."""
    size = draw(st.integers(least, 5))
    row = st.lists(number, min_size=size, max_size=size)
    readout = Readout(
        [f"m{index}" for index in range(size)],
        draw(row),
        draw(st.lists(scale, min_size=size, max_size=size)),
        draw(rules),
        draw(ks),
    )
    raw = draw(st.lists(row, max_size=4))
    return readout, np.array(raw, np.float32).reshape(-1, size)


def by_hand(rewards: list[float], combine: str, k: float) -> float:
    if combine == "min":
        return min(rewards)
    mean = statistics.fmean(rewards)
    return mean if combine == "mean" else mean - k * statistics.pstdev(rewards)


@given(ensembles())
def test_the_rules_are_their_formulas(ensemble: tuple[Readout, np.ndarray]) -> None:
    readout, raw = ensemble
    reading = readout.read(raw)
    assert reading.rewards.dtype == np.float64
    for index, row in enumerate(raw.tolist()):
        rewards = [
            (score - mean) / std
            for score, mean, std in zip(row, readout.means, readout.stds, strict=True)
        ]
        assert reading.members[index].tolist() == rewards
        size = max(1.0, *(abs(reward) for reward in rewards))
        close = {"rel": 1e-9, "abs": 1e-12 * size}
        expected = by_hand(rewards, readout.combine, readout.k)
        assert reading.rewards[index] == pytest.approx(expected, **close)
        assert reading.spread[index] == pytest.approx(statistics.pstdev(rewards), **close)
        raw_expected = by_hand(row, readout.combine, readout.k)
        assert reading.raw_scores[index] == pytest.approx(raw_expected, rel=1e-9, abs=1e-9)


@given(ensembles(least=2))
def test_the_rules_keep_their_bounds(ensemble: tuple[Readout, np.ndarray]) -> None:
    """Samuelson's inequality among them: no member lies more than sqrt(K - 1) spreads below."""
    readout, raw = ensemble
    far = math.sqrt(len(readout) - 1)
    by = {
        rule: replace(readout, combine=rule, k=k).read(raw)
        for rule, k in (("mean", 0.0), ("min", 0.0), ("mean_minus_std", far))
    }
    members = by["mean"].members
    slack = 1e-9 * (1.0 + np.abs(members).max(axis=-1))
    assert (by["min"].rewards <= by["mean"].rewards + slack).all()
    assert (by["mean"].rewards <= members.max(axis=-1) + slack).all()
    assert (by["mean_minus_std"].rewards <= by["min"].rewards + slack).all()
    assert (by["mean"].spread >= 0).all()
    without = replace(readout, combine="mean_minus_std", k=0.0).read(raw)
    assert without.rewards.tolist() == by["mean"].rewards.tolist()


@given(ensembles(least=2))
def test_the_order_of_the_members_does_not_matter(ensemble: tuple[Readout, np.ndarray]) -> None:
    readout, raw = ensemble
    expected = readout.read(raw)
    size = 1.0 + np.abs(expected.members).max(initial=0.0)
    for order in list(permutations(range(len(readout))))[:6]:
        shuffled = replace(
            readout,
            names=[readout.names[i] for i in order],
            means=[readout.means[i] for i in order],
            stds=[readout.stds[i] for i in order],
        ).read(raw[:, list(order)])
        np.testing.assert_allclose(shuffled.rewards, expected.rewards, atol=1e-12 * size)
        np.testing.assert_allclose(shuffled.spread, expected.spread, atol=1e-12 * size)


@given(ensembles(), number, scale)
def test_one_normalisation_for_all_may_come_before_or_after(
    ensemble: tuple[Readout, np.ndarray], mean: float, std: float
) -> None:
    readout, raw = ensemble
    size = len(readout)
    alike = replace(readout, means=[mean] * size, stds=[std] * size)
    reading = alike.read(raw)
    np.testing.assert_allclose(
        reading.rewards, (reading.raw_scores - mean) / std, rtol=1e-9, atol=1e-6
    )
    assert alike.normalisation == {"mean": mean, "std": std}


@given(number, number, scale, rules, ks)
def test_one_member_is_untouched_by_any_rule(
    score: float, mean: float, std: float, rule: str, k: float
) -> None:
    reading = Readout(["reward"], [mean], [std], rule, k).read(np.array([[score]], np.float32))
    assert reading.rewards.tolist() == [(score - mean) / std]  # bit by bit
    assert reading.raw_scores.tolist() == [score]
    assert reading.spread.tolist() == [0.0]


@pytest.mark.filterwarnings("error")
@given(
    ensembles(least=2), st.sampled_from([math.nan, math.inf, -math.inf]), st.integers(0, 19), rules
)
def test_what_is_not_finite_marks_its_own_sample_only(
    ensemble: tuple[Readout, np.ndarray], bad: float, where: int, rule: str
) -> None:
    readout, raw = replace(ensemble[0], combine=rule), ensemble[1]
    if not raw.size:
        return
    expected = readout.read(raw)
    assert expected.finite.all()
    row, column = divmod(where % raw.size, len(readout))
    raw[row, column] = bad
    reading = readout.read(raw)
    assert np.flatnonzero(~reading.finite).tolist() == [row]
    others = [index for index in range(len(raw)) if index != row]
    assert reading.rewards[others].tolist() == expected.rewards[others].tolist()
    [scores] = assemble([[[1]] * len(raw)], raw, readout, "sha256:0")
    assert scores.named_rewards is not None
    assert list(scores.named_rewards) == readout.names
    for index, error in enumerate(scores.errors):
        named = [rewards[index] for rewards in scores.named_rewards.values()]
        none = [scores.rewards[index], scores.raw_scores[index], *named]
        assert {value is None for value in none} == {index == row}
        message = f"m{column}'s reward is not finite"
        assert error == (SampleError("non_finite_reward", message) if index == row else None)


def test_a_reward_that_only_normalisation_makes_infinite_is_an_error() -> None:
    """JSON has no infinity."""
    reading = Readout(["reward"], [0.0], [1e-300]).read(np.array([[3e38], [0.5]], np.float32))
    assert reading.finite.tolist() == [False, True]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"combine": "median"}, "combine is 'median'; it must be one of mean, min"),
        ({"k": -1.0}, r"k is -1\.0"),
        ({"k": math.nan}, "k is nan"),
        ({"k": "1"}, "k is '1'"),
        ({"stds": [1.0, 0.0]}, "each must be above 0"),
        ({"means": [0.0]}, "1 means"),
        ({"names": ["a", "a"]}, "two members are named 'a'"),
        ({"names": []}, "0 names"),
    ],
)
def test_a_readout_that_cannot_be_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Readout(**{"names": ["a", "b"], "means": [0.0, 0.0], "stds": [1.0, 1.0], **fields})
