"""What a reward model has to beat: a length, and a bag of words."""

from __future__ import annotations

import random

import numpy as np
import pytest

from trainer.data.comparisons import Comparison, Comparisons
from trainer.evaluation import baselines
from trainer.evaluation.baselines import BAG_OF_WORDS, LENGTH, baseline_rewards
from trainer.evaluation.metrics import compare_with_baselines, evaluate

GOOD, BAD = 11, 12


def pair(noise: random.Random, key: str, longer: bool, words: bool) -> Comparison:
    """Chosen is the longer side, or has a good word, each if asked for; the rest is noise."""
    prompt = noise.choices(range(100, 120), k=5)
    lengths = noise.sample(range(10, 40), 2)
    lengths.sort(reverse=longer)
    sides = [noise.choices(range(20, 90), k=k) for k in lengths]
    if words:
        sides = [[*sides[0], GOOD], [*sides[1], BAD]]
    return Comparison([[*prompt, *side] for side in sides], (1.0, 0.0), key)


def comparisons(seed: int, num: int, longer: bool = True, words: bool = True) -> Comparisons:
    noise = random.Random(seed)
    return Comparisons.of([pair(noise, f"{seed}:{i}", longer, words) for i in range(num)], ["d"])


@pytest.mark.parametrize("longer", [True, False])
def test_length_learns_which_side_of_it_is_better(longer: bool) -> None:
    train, heldout = (comparisons(seed, 50, longer, words=False) for seed in (1, 2))
    rewards = baseline_rewards(train, heldout)[LENGTH]
    assert rewards.shape == (100,)
    assert evaluate(heldout, rewards).accuracy == 1


def test_a_bag_of_words_finds_the_words_that_decide() -> None:
    noise = random.Random(7)
    sides = [
        Comparisons.of([pair(noise, f"{i}", noise.random() < 0.5, True) for i in range(200)], ["d"])
        for _ in range(2)
    ]
    found = baseline_rewards(*sides)
    assert evaluate(sides[1], found[BAG_OF_WORDS]).accuracy > 0.95
    assert evaluate(sides[1], found[LENGTH]).accuracy < 0.65
    again = baseline_rewards(*sides)
    np.testing.assert_array_equal(again[BAG_OF_WORDS], found[BAG_OF_WORDS])


def test_the_rewards_do_not_depend_on_the_blocks_nor_on_words_never_learned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train, heldout = comparisons(1, 60), comparisons(2, 30)
    whole = baseline_rewards(train, heldout)[BAG_OF_WORDS]
    monkeypatch.setattr(baselines, "_BLOCK", 7)
    np.testing.assert_allclose(baseline_rewards(train, heldout)[BAG_OF_WORDS], whole, rtol=1e-6)
    unknown = Comparisons.of([Comparison([[5, 500], [5, 501, 502]], (1.0, 0.0), "new")], ["d"])
    assert np.isfinite(baseline_rewards(train, unknown)[BAG_OF_WORDS]).all()


def test_of_very_many_pairs_some_are_learned_from(monkeypatch: pytest.MonkeyPatch) -> None:
    train, heldout = comparisons(1, 200), comparisons(2, 50)
    monkeypatch.setattr(baselines, "_MAX_PAIRS", 60)
    some, same, others = (
        baseline_rewards(train, heldout, seed)[BAG_OF_WORDS] for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(some, same)
    assert (some != others).any()
    assert evaluate(heldout, some).accuracy > 0.9


def test_rankings_and_ties_are_learned_from_by_their_pairs() -> None:
    sides = [[GOOD] * 2, [GOOD, 50], [50, 50]]
    train = Comparisons.of(
        [Comparison([[7, 7, *side] for side in sides], (2.0, 1.0, 0.0), f"{i}") for i in range(20)]
        + [Comparison([[7, 60], [7, 61]], (1.0, 1.0), "tie")],
        ["d"],
    )
    heldout = Comparisons.of([Comparison([[9, GOOD], [9, 50]], (1.0, 0.0), "new")], ["d"])
    better, worse = baseline_rewards(train, heldout)[BAG_OF_WORDS]
    assert better > worse


def test_without_pairs_on_both_sides_there_is_no_baseline() -> None:
    some = comparisons(1, 3)
    alone = Comparisons.of([Comparison([[1, 2]], (0.0,), "k")], ["d"])
    none = Comparisons.of([], ["d"])
    for sides in ((some, alone), (alone, some), (some, none), (none, some)):
        assert baseline_rewards(*sides) == {}


def test_a_model_is_ahead_of_a_baseline_on_the_same_prompts() -> None:
    heldout = comparisons(2, 100)
    right = np.tile([1.0, 0.0], 100)
    half = right.copy()
    half[:100] = 1 - half[:100]
    found = compare_with_baselines(heldout, right, {"half": half, "as good": right * 3})
    assert (found["half"].accuracy, found["half"].lead.mean) == (0.5, 0.5)
    assert 0.38 < found["half"].lead.low < 0.5 < found["half"].lead.high < 0.62
    assert found["half"].lead.stderr == pytest.approx(0.05, abs=0.005)
    assert (found["as good"].lead.mean, found["as good"].lead.sign) == (0, 0)
