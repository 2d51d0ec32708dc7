"""The Bradley-Terry loss against its closed form, and its gradient against the derivative."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.loss import bradley_terry, correct

REWARD = st.floats(-50, 50, width=32)
PAIRS = st.lists(st.tuples(REWARD, REWARD, st.floats(0, 3, width=32)), min_size=1, max_size=8)


def closed_form(difference: float) -> float:
    """-log sigmoid in float64, without overflow on either side."""
    return max(-difference, 0.0) + math.log1p(math.exp(-abs(difference)))


@given(PAIRS)
def test_loss_and_gradient_are_those_of_the_formula(pairs):
    chosen, rejected, margin = (torch.tensor(side) for side in zip(*pairs, strict=True))
    chosen.requires_grad_(True)
    rejected.requires_grad_(True)
    losses = bradley_terry(chosen, rejected, margin)
    losses.sum().backward()
    assert losses.shape == chosen.shape
    for i, (c, r, m) in enumerate(pairs):
        difference = c - r - m
        assert losses[i].item() == pytest.approx(closed_form(difference), rel=1e-5, abs=1e-6)
        slope = -1 / (1 + math.exp(min(difference, 700)))
        assert chosen.grad[i].item() == pytest.approx(slope, rel=1e-4, abs=1e-6)
        assert rejected.grad[i].item() == pytest.approx(-slope, rel=1e-4, abs=1e-6)


def test_the_loss_is_float32_and_finite_for_any_rewards():
    side = torch.tensor([1e4, -1e4, 0.0], dtype=torch.bfloat16)
    losses = bradley_terry(side, -side)
    assert losses.dtype == torch.float32
    assert torch.isfinite(losses).all()
    assert losses[2].item() == pytest.approx(math.log(2))


def test_no_margin_is_a_margin_of_zero():
    chosen, rejected = torch.randn(5), torch.randn(5)
    assert torch.equal(
        bradley_terry(chosen, rejected), bradley_terry(chosen, rejected, torch.zeros(5))
    )


def test_a_tie_counts_half():
    wins = correct(torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0.0, 1.0, 2.0]))
    assert wins.tolist() == [1.0, 0.0, 0.5]
