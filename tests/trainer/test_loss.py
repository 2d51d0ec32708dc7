"""Losses of pairs and attributes against formulas in float64, gradients against derivatives."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trainer.loss import (
    attribute_loss,
    bradley_terry,
    centering,
    correct,
    davidson,
    rao_kupper,
)

NUMBER = st.floats(-6, 6)
SMOOTHING = st.sampled_from([0.0, 0.1, 0.4])
PAIRS = st.lists(st.tuples(NUMBER, NUMBER, st.floats(0, 3)), min_size=1, max_size=6)
CLOSE = {"rel": 1e-12, "abs": 1e-12}


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def with_gradients(
    loss: Callable[[Tensor, Tensor], Tensor], chosen: Tensor, rejected: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    chosen, rejected = chosen.clone().requires_grad_(True), rejected.clone().requires_grad_(True)
    losses = loss(chosen, rejected)
    losses.sum().backward()
    return losses.detach(), chosen.grad, rejected.grad


def columns(pairs: list[tuple[float, float, float]]) -> list[Tensor]:
    return [torch.tensor(side, dtype=torch.float64) for side in zip(*pairs, strict=True)]


@given(PAIRS, SMOOTHING)
def test_a_pair_costs_the_expected_surprise_and_pulls_by_its_probability(pairs, eps):
    chosen, rejected, margin = columns(pairs)
    losses, by_chosen, by_rejected = with_gradients(
        lambda c, r: bradley_terry(c, r, margin, eps), chosen, rejected
    )
    for i, (c, r, m) in enumerate(pairs):
        right, swapped = sigmoid(c - r - m), sigmoid(r - c - m)
        expected = -(1 - eps) * math.log(right) - eps * math.log(swapped)
        slope = -(1 - eps) * (1 - right) + eps * (1 - swapped)
        found = (losses[i].item(), by_chosen[i].item(), by_rejected[i].item())
        assert found == pytest.approx((expected, slope, -slope), **CLOSE)


def test_the_best_difference_under_label_smoothing_is_the_log_odds_of_the_labels():
    best = torch.tensor([math.log(0.9 / 0.1)], dtype=torch.float64)
    _, slope, _ = with_gradients(
        lambda c, r: bradley_terry(c, r, label_smoothing=0.1), best, torch.zeros_like(best)
    )
    assert slope.item() == pytest.approx(0, abs=1e-15)


@given(PAIRS, st.floats(0.01, 4), SMOOTHING)
def test_rao_kupper_is_its_three_probabilities(pairs, log_theta, eps):
    chosen, rejected, margin = columns(pairs)
    theta = math.exp(log_theta)
    for tied in (False, True):
        flags = torch.full(chosen.shape, tied)
        losses, by_chosen, by_rejected = with_gradients(
            lambda c, r, f=flags: rao_kupper(c, r, f, log_theta, margin, eps), chosen, rejected
        )
        for i, (c, r, m) in enumerate(pairs):
            if tied:
                worth, other = math.exp(c), math.exp(r)
                wins, wins_not = worth + theta * other, theta * worth + other
                expected = -math.log(math.expm1(2 * log_theta) * worth * other / (wins * wins_not))
                slope = sigmoid(c - r + log_theta) - sigmoid(r - c + log_theta)
            else:
                right, swapped = (1 / (1 + theta * math.exp(m - d)) for d in (c - r, r - c))
                expected = -(1 - eps) * math.log(right) - eps * math.log(swapped)
                slope = -(1 - eps) * (1 - right) + eps * (1 - swapped)
            found = (losses[i].item(), by_chosen[i].item(), by_rejected[i].item())
            assert found == pytest.approx((expected, slope, -slope), **CLOSE)


@given(PAIRS, st.floats(0.01, 9), SMOOTHING)
def test_davidson_is_its_three_probabilities(pairs, nu, eps):
    chosen, rejected, margin = columns(pairs)

    def decided(d: float) -> tuple[float, float]:
        """Probability that chosen wins, and the slope of its surprise in d."""
        win, lose = math.exp(d / 2), math.exp(-d / 2)
        total = win + lose + nu
        return win / total, (win - lose) / 2 / total - 0.5

    for tied in (False, True):
        flags = torch.full(chosen.shape, tied)
        losses, by_chosen, by_rejected = with_gradients(
            lambda c, r, f=flags: davidson(c, r, f, nu, margin, eps), chosen, rejected
        )
        for i, (c, r, m) in enumerate(pairs):
            if tied:
                win, lose = math.exp((c - r) / 2), math.exp((r - c) / 2)
                expected = -math.log(nu / (win + lose + nu))
                slope = (win - lose) / 2 / (win + lose + nu)
            else:
                (right, up), (swapped, down) = decided(c - r - m), decided(r - c - m)
                expected = -(1 - eps) * math.log(right) - eps * math.log(swapped)
                slope = (1 - eps) * up - eps * down
            found = (losses[i].item(), by_chosen[i].item(), by_rejected[i].item())
            assert found == pytest.approx((expected, slope, -slope), **CLOSE)


@pytest.mark.parametrize("loss", [rao_kupper, davidson])
@given(NUMBER, NUMBER, st.floats(0.01, 4))
def test_win_loss_and_tie_exhaust_what_can_happen(loss, chosen, rejected, parameter):
    one, other = torch.tensor([[chosen], [rejected]], dtype=torch.float64)
    no, yes = torch.tensor([False]), torch.tensor([True])
    outcomes = [(one, other, no), (other, one, no), (one, other, yes)]
    total = sum(math.exp(-loss(*outcome, parameter).item()) for outcome in outcomes)
    assert total == pytest.approx(1, abs=1e-12)


@given(PAIRS, NUMBER)
def test_pairs_do_not_see_a_shift_of_all_rewards(pairs, shift):
    chosen, rejected, margin = columns(pairs)
    tied = torch.arange(len(pairs)) % 2 == 0
    for loss in (
        lambda c, r: bradley_terry(c, r, margin, 0.1),
        lambda c, r: rao_kupper(c, r, tied, 1.0, margin),
        lambda c, r: davidson(c, r, tied, 1.0, margin),
    ):
        shifted = loss(chosen + shift, rejected + shift)
        torch.testing.assert_close(shifted, loss(chosen, rejected), rtol=0, atol=1e-12)


@given(st.lists(NUMBER, min_size=2, max_size=6))
def test_centring_is_the_square_of_twice_the_mean_whatever_the_spread(row):
    rewards = torch.tensor([row], dtype=torch.float64, requires_grad=True)
    loss = centering(rewards, torch.ones_like(rewards).bool())
    loss.sum().backward()
    size, total = len(row), sum(row)
    assert loss.item() == pytest.approx((2 * total / size) ** 2, **CLOSE)
    assert rewards.grad[0].tolist() == pytest.approx([8 * total / size**2] * size, **CLOSE)


def test_centring_of_a_pair_is_the_squared_sum_and_a_single_one_is_left_alone():
    rewards = torch.tensor([[1.5, -0.25], [3.0, 7.0]], requires_grad=True)
    losses = centering(rewards, torch.tensor([[True, True], [True, False]]))
    losses.sum().backward()
    assert losses.tolist() == [1.25**2, 0]
    assert rewards.grad[1].tolist() == [0, 0]


@given(st.lists(st.tuples(NUMBER, NUMBER, st.booleans()), min_size=1, max_size=5))
def test_attributes_cost_the_mean_square_over_the_known_ones(items):
    outputs = torch.tensor([[o for o, _, _ in items]], dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([[t if known else math.nan for _, t, known in items]]).double()
    loss = attribute_loss(outputs, targets)
    loss.sum().backward()
    errors = [
        o - t if known else 0.0
        for o, t, (_, _, known) in zip(outputs[0].tolist(), targets[0].tolist(), items, strict=True)
    ]
    num_known = max(1, sum(known for _, _, known in items))
    assert loss.shape == (1,)
    assert loss.item() == pytest.approx(sum(e * e for e in errors) / num_known, **CLOSE)
    assert outputs.grad[0].tolist() == pytest.approx([2 * e / num_known for e in errors], **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_losses_are_float32_and_finite_with_their_gradients_for_any_rewards(dtype):
    side = torch.tensor([1e4, -1e4, 0.0], dtype=dtype)
    margin, tied = torch.full((3,), 2.0), torch.tensor([False, True, True])
    losses: list[Callable[[Tensor, Tensor], Tensor]] = [
        lambda c, r: bradley_terry(c, r, margin, 0.1),
        lambda c, r: rao_kupper(c, r, tied, 1.0, margin, 0.1),
        lambda c, r: rao_kupper(c, r, ~tied, 1e-6, margin, 0.1),
        lambda c, r: rao_kupper(c, r, tied, 1e3, margin, 0.1),
        lambda c, r: davidson(c, r, tied, 1.0, margin, 0.1),
        lambda c, r: davidson(c, r, ~tied, 1e-6, margin, 0.1),
    ]
    for loss in losses:
        values, by_chosen, by_rejected = with_gradients(loss, side, -side)
        assert values.dtype == torch.float32
        assert torch.cat([values, by_chosen, by_rejected]).isfinite().all()
        assert by_chosen.abs().max() <= 2
        torch.testing.assert_close(by_chosen, -by_rejected)


def test_no_margin_is_a_margin_of_zero():
    chosen, rejected = torch.tensor([0.5, -1.0]), torch.tensor([2.0, -1.5])
    zero = torch.zeros(2)
    assert torch.equal(bradley_terry(chosen, rejected), bradley_terry(chosen, rejected, zero))


def test_a_tie_counts_half():
    wins = correct(torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0.0, 1.0, 2.0]))
    assert wins.tolist() == [1.0, 0.0, 0.5]
