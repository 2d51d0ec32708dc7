"""The loss of rankings against brute force, and its gradient against the derivative by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trainer.loss import bradley_terry, plackett_luce

NUMBER = st.floats(-6, 6)
RANKING = st.lists(st.tuples(NUMBER, st.integers(0, 3)), min_size=1, max_size=6).map(
    lambda items: sorted(items, key=lambda item: -item[1])
)
CLOSE = {"rel": 1e-12, "abs": 1e-12}


def ranked(ranking: list[tuple[float, int]]) -> tuple[Tensor, Tensor, Tensor]:
    """One row for `plackett_luce`: rewards, scores, mask."""
    rewards, scores = zip(*ranking, strict=True)
    row = torch.tensor([rewards], dtype=torch.float64)
    return row, torch.tensor([scores], dtype=torch.float32), torch.ones_like(row).bool()


@given(RANKING)
def test_a_ranking_without_ties_is_a_product_of_choices(ranking):
    rewards, _, mask = ranked(ranking)
    scores = -torch.arange(len(ranking))[None]
    rewards.requires_grad_(True)
    loss = plackett_luce(rewards, scores, mask)
    loss.sum().backward()
    worth = [math.exp(reward) for reward, _ in ranking]
    probability, slopes = 1.0, [-1.0] * len(worth)
    for stage in range(len(worth)):
        left = sum(worth[stage:])
        probability *= worth[stage] / left
        for i in range(stage, len(worth)):
            slopes[i] += worth[i] / left
    assert loss.item() == pytest.approx(-math.log(probability), **CLOSE)
    assert rewards.grad[0].tolist() == pytest.approx(slopes, **CLOSE)


@given(RANKING)
def test_ties_in_a_ranking_share_what_is_left_as_efron_has_it(ranking):
    rewards, scores, mask = ranked(ranking)
    rewards.requires_grad_(True)
    loss = plackett_luce(rewards, scores, mask)
    loss.sum().backward()
    worth = [math.exp(reward) for reward, _ in ranking]
    expected, slopes = 0.0, [-1.0] * len(worth)
    for score in {score for _, score in ranking}:
        equal = [i for i, (_, other) in enumerate(ranking) if other == score]
        lower = [i for i, (_, other) in enumerate(ranking) if other < score]
        for gone in range(len(equal)):
            share = 1 - gone / len(equal)
            left = sum(worth[i] for i in lower) + share * sum(worth[i] for i in equal)
            expected += math.log(left)
            for i in lower:
                slopes[i] += worth[i] / left
            for i in equal:
                slopes[i] += share * worth[i] / left
        expected -= sum(ranking[i][0] for i in equal)
    assert loss.item() == pytest.approx(expected, **CLOSE)
    assert rewards.grad[0].tolist() == pytest.approx(slopes, **CLOSE)


@given(st.lists(NUMBER, min_size=2, max_size=3), NUMBER, st.integers(2, 3))
def test_ties_of_equal_reward_cost_what_any_order_of_them_costs(others, reward, num_tied):
    """Brute force over the orders of the tied ones, which come before the others."""
    rewards = torch.tensor([[reward] * num_tied + others], dtype=torch.float64)
    mask = torch.ones_like(rewards).bool()
    ranks = torch.tensor([[9] * num_tied + [-i for i in range(len(others))]])
    tie = plackett_luce(rewards, ranks, mask).item()
    for order in itertools.permutations(range(num_tied)):
        probability, left = 1.0, [math.exp(r) for r in rewards[0].tolist()]
        for worth in [left[i] for i in order] + left[num_tied:]:
            probability *= worth / sum(left)
            left.remove(worth)
        assert tie == pytest.approx(-math.log(probability), **CLOSE)


@given(RANKING, st.randoms(use_true_random=False))
def test_the_order_of_equal_scores_and_padding_change_nothing(ranking, random):
    loss = plackett_luce(*ranked(ranking)).item()
    shuffled = sorted(random.sample(ranking, len(ranking)), key=lambda item: -item[1])
    assert plackett_luce(*ranked(shuffled)).item() == pytest.approx(loss, **CLOSE)
    rewards, scores, mask = ranked(ranking)
    pad = torch.tensor([[1e30, math.nan]], dtype=torch.float64)
    padded = torch.cat([rewards, pad], 1).requires_grad_(True)
    with_padding = plackett_luce(
        padded, torch.cat([scores, pad.float()], 1), torch.cat([mask, ~pad.bool()], 1)
    )
    with_padding.sum().backward()
    assert with_padding.item() == pytest.approx(loss, **CLOSE)
    assert padded.grad[0, -2:].tolist() == [0, 0]


@given(st.lists(st.tuples(NUMBER, NUMBER), min_size=1, max_size=6))
def test_a_ranking_of_two_is_a_pair(pairs):
    rewards = torch.tensor(pairs, dtype=torch.float64)
    chosen, rejected = rewards.unbind(1)
    scores = torch.tensor([[1.0, 0.0]]).expand(rewards.shape)
    losses = plackett_luce(rewards, scores, torch.ones_like(rewards).bool())
    assert torch.equal(losses, bradley_terry(chosen, rejected))


@given(RANKING, NUMBER)
def test_rankings_do_not_see_a_shift_of_all_rewards(ranking, shift):
    rewards, scores, mask = ranked(ranking)
    shifted = plackett_luce(rewards + shift, scores, mask).item()
    assert shifted == pytest.approx(plackett_luce(rewards, scores, mask).item(), **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_rewards_cost_a_finite_float32_and_pull_by_at_most_their_stages(dtype):
    row = torch.tensor([1e4, -1e4, 0.0, 1e4], dtype=dtype)
    rewards = torch.stack([row, -row, row.flip(0)]).requires_grad_(True)
    scores = torch.tensor([[3, 2, 1, 0], [2, 2, 1, 1], [5, 5, 5, 5]])
    losses = plackett_luce(rewards, scores, torch.ones_like(scores).bool())
    losses.sum().backward()
    assert losses.dtype == torch.float32
    assert losses.isfinite().all()
    assert rewards.grad.abs().max() <= 3
    assert losses[0].item() == pytest.approx(3e4, rel=1e-2)
