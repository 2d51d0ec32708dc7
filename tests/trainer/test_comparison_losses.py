"""What a micro-batch of pairs, rankings and single completions costs, comparison by comparison."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trainer.config.train import LossConfig
from trainer.data.comparisons import Comparison, Comparisons, holds_ties
from trainer.loss import Labels, comparison_losses, davidson, pair_counts, plackett_luce

CLOSE = {"rtol": 0, "atol": 1e-12}
ATTRIBUTES = {"helpfulness": 0.75, "verbosity": -0.5}
TARGET = st.sampled_from([math.nan, 0.0, 1.5, 4.0])


@st.composite
def comparison(draw: st.DrawFn, sizes: tuple[int, ...] = (1, 2, 3, 4)) -> Comparison:
    size = draw(st.sampled_from(sizes))
    scores = sorted(draw(st.lists(st.integers(0, 2), min_size=size, max_size=size)), reverse=True)
    tied = scores[0] == scores[-1]
    row = st.lists(TARGET, min_size=2, max_size=2)
    return Comparison(
        sequences=[[1]] * size,
        scores=[float(score) for score in scores],
        key="",
        margin=0.0 if size != 2 or tied else draw(st.sampled_from([0.0, 0.5, 2.0])),
        attributes=draw(st.lists(row, min_size=size, max_size=size)),
    )


MIXED = st.lists(comparison(), min_size=1, max_size=6)


def data_set(items: list[Comparison]) -> Comparisons:
    return Comparisons.of(items, ["rows.jsonl"], num_attributes=2)


def labels_of(items: list[Comparison]) -> Labels:
    return Labels.of(data_set(items), range(len(items)), "cpu")


def outputs_for(items: list[Comparison], *shape: int) -> Tensor:
    size = sum(len(item.sequences) for item in items)
    generator = torch.Generator().manual_seed(size)
    return torch.randn(size, *shape, generator=generator, dtype=torch.float64).requires_grad_(True)


def by_hand(rewards: list[float], item: Comparison, config: LossConfig, has_ties: bool) -> float:
    """The preference loss and the centring of one comparison."""
    if len(rewards) == 1:
        return 0.0
    centring = config.center_rewards_coefficient * (2 * sum(rewards) / len(rewards)) ** 2
    if len(rewards) > 2:
        row = torch.tensor([rewards], dtype=torch.float64)
        scores = torch.tensor([item.scores])
        return centring + plackett_luce(row, scores, torch.ones_like(row).bool()).item()
    d, m = rewards[0] - rewards[1], item.margin if config.use_margin else 0.0
    theta = math.exp(config.tie_parameter) if has_ties else 1.0
    right, swapped = 1 / (1 + theta * math.exp(m - d)), 1 / (1 + theta * math.exp(m + d))
    eps = config.label_smoothing
    if item.scores[0] != item.scores[1]:
        return centring - (1 - eps) * math.log(right) - eps * math.log(swapped)
    if has_ties:
        return centring - math.log((theta**2 - 1) * right * swapped)
    return centring - 0.5 * math.log(right) - 0.5 * math.log(swapped)


@given(MIXED, st.booleans(), st.booleans(), st.sampled_from(["bradley_terry", "log_exp"]))
def test_a_mixed_micro_batch_costs_what_its_comparisons_cost(items, has_ties, use_margin, kind):
    config = LossConfig.model_validate(
        {
            "kind": kind,
            "use_margin": use_margin,
            "label_smoothing": 0.1,
            "center_rewards_coefficient": 0.25,
        }
    )
    outputs, labels = outputs_for(items), labels_of(items)
    result = comparison_losses(outputs, labels, config, has_ties)
    rewards = outputs.tolist()
    expected = [
        by_hand(rewards[begin:end], item, config, has_ties)
        for item, (begin, end) in zip(
            items, itertools.pairwise(labels.starts.tolist()), strict=True
        )
    ]
    assert torch.equal(result.rewards, outputs)
    torch.testing.assert_close(result.losses.tolist(), expected, **CLOSE)


def test_davidson_is_the_model_of_ties_when_it_is_asked_for():
    items = [Comparison([[1], [2]], [1.0, 0.0], ""), Comparison([[1], [2]], [1.0, 1.0], "")]
    outputs, config = outputs_for(items), LossConfig(ties="davidson", tie_parameter=0.5)
    result = comparison_losses(outputs, labels_of(items), config, has_ties=True)
    expected = davidson(outputs[::2], outputs[1::2], torch.tensor([False, True]), 0.5)
    assert torch.equal(result.losses, expected)


@given(MIXED, MIXED, st.sampled_from(["rao_kupper", "davidson"]))
def test_two_micro_batches_cost_the_same_together_and_apart(some, others, ties):
    config = LossConfig.model_validate(
        {
            "ties": ties,
            "label_smoothing": 0.2,
            "center_rewards_coefficient": 0.1,
            "attributes": ATTRIBUTES,
        }
    )
    outputs = outputs_for([*some, *others], 2)
    together = comparison_losses(outputs, labels_of([*some, *others]), config, has_ties=True)
    middle = sum(len(item.sequences) for item in some)
    apart = [
        comparison_losses(part, labels_of(items), config, has_ties=True)
        for part, items in ((outputs[:middle], some), (outputs[middle:], others))
    ]
    losses = torch.cat([part.losses for part in apart])
    torch.testing.assert_close(together.losses, losses, **CLOSE)
    torch.testing.assert_close(together.rewards, torch.cat([part.rewards for part in apart]))
    gradients = [torch.autograd.grad(loss.sum(), outputs) for loss in (together.losses, losses)]
    torch.testing.assert_close(*gradients, **CLOSE)


@given(MIXED)
def test_several_heads_are_rewarded_by_their_weights_and_regressed_on_their_targets(items):
    config = LossConfig(attributes=ATTRIBUTES, attribute_coefficient=3.0)
    outputs, labels = outputs_for(items, 2), labels_of(items)
    result = comparison_losses(outputs, labels, config, has_ties=False)
    rewards = [0.75 * first - 0.5 * second for first, second in outputs.tolist()]
    torch.testing.assert_close(result.rewards.tolist(), rewards, **CLOSE)
    first = 0
    for item, loss in zip(items, result.losses.tolist(), strict=True):
        mine = range(first, first + len(item.sequences))
        errors = []
        for row, targets in zip(outputs[mine].tolist(), item.attributes, strict=True):
            known = [(o - t) ** 2 for o, t in zip(row, targets, strict=True) if not math.isnan(t)]
            errors.append(sum(known) / len(known) if known else 0.0)
        expected = by_hand([rewards[i] for i in mine], item, config, has_ties=False)
        expected += 3 * sum(errors) / len(errors)
        assert loss == pytest.approx(expected, rel=1e-12, abs=1e-12)
        first = mine.stop


def test_one_attribute_needs_no_second_dimension():
    labels = Labels.of(
        Comparisons.of([Comparison([[1]], [0.0], "", attributes=[[2.0]])], ["rows"], 1), [0], "cpu"
    )
    config = LossConfig(attributes={"quality": 0.5})
    for outputs in (torch.tensor([3.0]), torch.tensor([[3.0]])):
        result = comparison_losses(outputs, labels, config, has_ties=False)
        assert result.losses.tolist() == [1.0]
        assert result.rewards.tolist() == [1.5]


@pytest.mark.parametrize("shape", [(), (2,)])
@pytest.mark.parametrize("has_ties", [False, True])
def test_an_empty_micro_batch_still_reaches_the_network(shape, has_ties):
    items = [Comparison([[1], [2]], [1.0, 0.0], "")]
    config = LossConfig(center_rewards_coefficient=0.1, attributes=ATTRIBUTES if shape else {})
    labels = Labels.of(data_set(items), [], "cpu")
    network = torch.ones(1, *shape, requires_grad=True)
    result = comparison_losses(network[:0], labels, config, has_ties)
    result.losses.sum().backward()
    assert result.losses.shape == result.rewards.shape == (0,)
    assert not network.grad.any()
    assert pair_counts(result.rewards, labels).num_pairs.item() == 0


@given(st.lists(comparison(sizes=(1,)), min_size=1, max_size=3))
def test_single_completions_have_no_preference_and_still_reach_the_network(items):
    outputs, config = outputs_for(items), LossConfig(center_rewards_coefficient=1.0)
    result = comparison_losses(outputs, labels_of(items), config, has_ties=True)
    result.losses.sum().backward()
    assert not result.losses.any()
    assert not outputs.grad.any()


@given(MIXED, st.sampled_from([0.0, 1.0]))
def test_counts_are_over_every_pair_of_a_comparison_with_different_scores(items, grain):
    labels, rewards = labels_of(items), outputs_for(items).detach().float()
    if grain:
        rewards = rewards.round()
    num_pairs, num_correct, sum_margin, first = 0, 0.0, 0.0, 0
    for item in items:
        mine = list(zip(item.scores, rewards[first:].tolist(), strict=False))
        for (score, reward), (other, its) in itertools.permutations(mine, 2):
            if score > other:
                num_pairs += 1
                num_correct += 1 if reward > its else 0.5 if reward == its else 0
                sum_margin += reward - its
        first += len(item.scores)
    counts = pair_counts(rewards.requires_grad_(True), labels)
    assert (counts.num_pairs.item(), counts.num_correct.item()) == (num_pairs, num_correct)
    assert counts.sum_margin.item() == pytest.approx(sum_margin, abs=1e-12)
    assert counts.sum_margin.dtype == torch.float64
    assert not counts.sum_margin.requires_grad


@given(MIXED, st.data())
def test_labels_are_those_of_the_chosen_comparisons_in_their_order(items, data):
    indices = data.draw(st.lists(st.integers(0, len(items) - 1), max_size=5))
    labels, expected = Labels.of(data_set(items), indices, "cpu"), [items[i] for i in indices]
    sizes = [len(item.sequences) for item in expected]
    assert labels.starts.dtype == torch.int64
    assert labels.starts.tolist() == np.cumsum([0, *sizes]).tolist()
    assert labels.scores.tolist() == [score for item in expected for score in item.scores]
    assert labels.margins.tolist() == [item.margin for item in expected]
    attributes = np.array([row for item in expected for row in item.attributes]).reshape(-1, 2)
    np.testing.assert_array_equal(labels.attributes.numpy(), attributes)


def test_a_data_set_holds_ties_when_a_pair_is_one_not_a_ranking():
    pair = Comparison([[1], [2]], [1.0, 0.0], "")
    ranking = Comparison([[1], [2], [3]], [1.0, 1.0, 0.0], "")
    tie = Comparison([[1], [2]], [1.0, 1.0], "")
    single = Comparison([[1]], [0.0], "")
    assert not holds_ties(data_set([]))
    assert not holds_ties(data_set([ranking, pair, single]))
    assert holds_ties(data_set([single, pair, tie, ranking]))


@pytest.mark.parametrize("ties", ["rao_kupper", "davidson"])
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_extreme_rewards_cost_a_finite_float32_and_pull_by_a_finite_one(ties, size):
    items = [
        Comparison([[1], [2]], [1.0, 0.0], "", margin=1.0),
        Comparison([[1], [2]], [1.0, 1.0], ""),
        Comparison([[1], [2], [3], [4]], [2.0, 1.0, 1.0, 0.0], ""),
        Comparison([[1]], [0.0], ""),
    ]
    outputs = (size * torch.tensor([1, -1, 1, -1, 1, 0, -1, -2, 1.0])).requires_grad_(True)
    config = LossConfig(ties=ties, label_smoothing=0.1, center_rewards_coefficient=0.01)
    result = comparison_losses(outputs, labels_of(items), config, has_ties=True)
    result.losses.sum().backward()
    assert result.losses.dtype == torch.float32
    assert result.losses.isfinite().all()
    assert outputs.grad.isfinite().all()
