"""Rollouts as rows, what is made of them, and what a run comes to."""

from __future__ import annotations

from statistics import fmean, stdev
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward_actor.groups import Group, GroupScores, SampleError
from reward_actor.rollout.records import RolloutGroup, Sampling
from reward_actor.rollout.rows import (
    FORMS,
    best_against_worst,
    best_of,
    columns_of,
    problems_of,
    question_in,
    rollout_row,
    with_advantages,
)
from reward_actor.rollout.summary import Summary, histogram

ASKING = {"question": "Name two fruits.", "id": "q7", "label": 3}


def group(
    rewards: list[float | None] | None = None, reasons: tuple[str, ...] = ("stop", "length")
) -> RolloutGroup:
    texts = [f"completion {place}" for place in range(len(reasons))]
    scores = None
    if rewards is not None:
        errors = [None if r is not None else SampleError("too_long", "9 tokens") for r in rewards]
        num = len(rewards)
        scores = GroupScores(rewards, rewards, [4] * num, [False] * num, errors, "v")
    return RolloutGroup(
        "Name two fruits.",
        [1, 2],
        texts,
        [[7, 8]] * len(texts),
        [[-1.0, -2.0]] * len(texts),
        list(reasons),
        scores,
        index=5,
        policy_versions=[[0, 0]] * len(texts),
        ended_with_eos=[reason == "stop" for reason in reasons],
    )


def test_a_row_keeps_what_it_had_and_says_what_was_sampled() -> None:
    row = rollout_row(group([1.0, None]), ASKING)
    assert {name: row[name] for name in ASKING} == ASKING
    assert row["prompt"] == "Name two fruits."
    assert row["prompt_index"] == 5
    assert row["num_completion_tokens"] == [2, 2]
    assert row["ended_with_eos"] == [True, False]
    assert row["finish_reasons"] == ["stop", "length"]
    assert row["rewards"] == [1.0, None]
    assert row["errors"][1] == {"type": "too_long", "message": "9 tokens"}
    assert "error" not in row
    assert "policy_versions" not in row, "a file has one policy"


def test_what_rollouts_lack_is_told() -> None:
    assert problems_of(rollout_row(group(), {}), 2) == [None, None], "sampled only"
    assert problems_of(rollout_row(group([1.0, None]), {}), 2) == [None, "too_long: 9 tokens"]
    lost = rollout_row(RolloutGroup("Hi.", error="no room"), {})
    assert problems_of(lost, 3) == ["not sampled: no room"] * 3


def test_a_row_asks_in_the_column_that_is_named() -> None:
    assert question_in(ASKING, "f:1", "question", columns_of(None, "question")) == Group(
        "Name two fruits."
    )
    with pytest.raises(ValueError, match=r"f:1: has no 'prompt', only id, label, question"):
        question_in(ASKING, "f:1", "prompt", columns_of(None, "prompt"))


def test_columns_of_ours_are_refused() -> None:
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    assert question_in(pair, "f:1", "prompt", columns_of("advantages", "prompt")) == Group("a")
    with pytest.raises(ValueError, match=r"f:1: has chosen, rejected, which rollouts are written"):
        question_in(pair, "f:1", "prompt", columns_of("pairs", "prompt"))
    with pytest.raises(ValueError, match=r"f:2: has rewards, which"):
        question_in({"prompt": "a", "rewards": []}, "f:2", "prompt", columns_of(None, "prompt"))
    both = {"prompt": "a", "question": "b"}
    with pytest.raises(ValueError, match="f:3: has prompt, which rollouts are written as"):
        question_in(both, "f:3", "question", columns_of(None, "question"))


Rewards = st.lists(st.none() | st.floats(-5, 5), min_size=1, max_size=6)


@given(Rewards)
def test_advantages_are_of_the_group_without_those_that_have_no_reward(
    rewards: list[float | None],
) -> None:
    reasons = ("stop",) * len(rewards)
    [row] = with_advantages(rollout_row(group(rewards, reasons), {}))
    known = [reward for reward in rewards if reward is not None]
    scale = (stdev(known) if len(known) > 1 else 0.0) + 1e-4
    for reward, advantage, normalized in zip(
        rewards, row["advantages"], row["normalized_advantages"], strict=True
    ):
        if reward is None:
            assert advantage is None
            assert normalized is None
        else:
            assert advantage == pytest.approx(reward - fmean(known), abs=1e-9)
            assert normalized == pytest.approx((reward - fmean(known)) / scale, abs=1e-6)


@given(Rewards)
def test_the_best_and_the_worst_are_the_rewards_ends(rewards: list[float | None]) -> None:
    row = rollout_row(group(rewards, ("stop",) * len(rewards)), ASKING)
    known = {f"completion {i}": r for i, r in enumerate(rewards) if r is not None}
    best = best_of(row)
    assert bool(best) == bool(known)
    for made in best:
        assert made["reward"] == known[made["completion"]] == max(known.values())
        assert made["id"] == "q7"
        assert "completions" not in made
    pairs = best_against_worst(row)
    assert bool(pairs) == (len(set(known.values())) > 1)
    for made in pairs:
        assert known[made["chosen"]] == max(known.values())
        assert known[made["rejected"]] == min(known.values())
        assert made["margin"] == pytest.approx(max(known.values()) - min(known.values()))
        assert made["margin"] > 0


def test_an_unsampled_prompt_makes_nothing() -> None:
    row = rollout_row(RolloutGroup("Hi.", error="no room"), {})
    assert best_of(row) == best_against_worst(row) == []
    [made] = FORMS["advantages"].rows(row)
    assert made["advantages"] == []


def test_the_summary_counts() -> None:
    summary = Summary()
    summary.add(rollout_row(group([1.0, 3.0]), {}))
    summary.begin()
    summary.add(rollout_row(group([2.0, None]), {}))
    summary.add(rollout_row(RolloutGroup("Hi.", error="no room"), {}))
    assert summary.num_unsampled == 1
    first, *bars, completions, speed = summary.text()
    assert first == ("reward: mean +2.0000, standard deviation 0.8165, 1.0000 within a prompt")
    assert len(bars) == 10
    assert completions == (
        "completions: 50.0% cut by length, 25.0% without a reward, 1 of 3 prompts not sampled"
    )
    assert "tokens/s sampled, " in speed
    assert summary.line().startswith(
        "reward: mean +2.0000, 1.0000 within a prompt, 50.0% cut by length, 25.0% without a rew"
    )
    assert not any("different models" in line for line in summary.text())
    summary.add({**rollout_row(group([2.0, 1.0]), {}), "model_version": "w"})
    assert "rewards are of different models: v, w" in summary.text()


def test_a_summary_without_a_scorer_says_nothing_of_rewards() -> None:
    summary = Summary()
    summary.add(rollout_row(group(), {}))
    assert summary.text() == ["completions: 50.0% cut by length"], "nothing was sampled now"
    summary.begin()
    assert "scored" not in summary.text()[-1]


@given(st.lists(st.integers(-1000, 1000), min_size=1, max_size=50))
def test_a_histogram_counts_every_value_once(values: list[int]) -> None:
    lines = histogram([value / 8 for value in values])
    assert len(lines) == (10 if len(set(values)) > 1 else 1)
    assert sum(int(line.split()[-1]) for line in lines) == len(values)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_completions": 0}, "num_completions is 0"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"temperature": -1.0}, r"temperature is -1\.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": 0.0}, "temperature 0 always gives one completion, not 4"),
        ({"top_p": 0.0}, r"top_p is 0\.0"),
        ({"seed": -1}, "seed is -1"),
        ({"stop": "x"}, "give a list"),
        ({"other": {"seed": 1, "top_k": 3}}, "other has seed, which Sampling sets by itself"),
    ],
)
def test_nonsense_sampling_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**wrong)


def test_no_two_completions_of_runs_prompts_and_turns_share_random_numbers() -> None:
    """PyTorch's generator on a CPU takes the low 32 bits of a seed alone."""
    firsts = [
        Sampling(seed=seed).seed_of_prompt(index, turn)
        for seed in range(4)
        for index in range(64)
        for turn in range(3)
    ]
    seeds = {(first + place) % 2**32 for first in firsts for place in range(8)}
    assert len(seeds) == 8 * len(firsts)
    assert max(firsts) < 2**62, "vLLM takes 64 bits with a sign"
    assert Sampling(seed=3).seed_of_prompt(7) == Sampling(seed=3).seed_of_prompt(7)
