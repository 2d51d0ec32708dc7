"""What the trainers in examples/ compute with: the arithmetic of batches, GRPO, PPO, best-of-N."""

from __future__ import annotations

import shutil
from itertools import combinations
from pathlib import Path
from statistics import fmean

import pytest
import torch
from grpo import advantages_of
from hypothesis import given
from hypothesis import strategies as st
from policy_gradient import Batch, clipped_loss, kl_to, rewards_of, shuffled
from ppo import (
    clipped_errors,
    gae,
    require_same_tokenizer,
    whitened,
    with_reward_at_the_end,
)
from rejection_sampling import best_of_n
from transformers import AutoTokenizer

from reward_actor.groups import GroupScores, SampleError
from reward_actor.rollout import RolloutGroup


def group(
    prompt: list[int], completions: list[list[int]], rewards: list[float | None]
) -> RolloutGroup:
    n = len(completions)
    errors = [None if r is not None else SampleError("too_long", "") for r in rewards]
    scores = GroupScores(rewards, rewards, [1] * n, [False] * n, errors, "v")
    log_probs = [[-float(id) for id in ids] for ids in completions]
    return RolloutGroup("", prompt, [""] * n, completions, log_probs, scores=scores)


GROUPS = [
    group([1, 2, 3], [[4, 5], [6]], [1.0, None]),
    group([7], [[8, 9, 10], [11, 12]], [2.0, 4.0]),
]


def test_a_batch_knows_which_tokens_were_sampled() -> None:
    batch = Batch.of(GROUPS, pad_token_id=0)
    assert batch.ids.tolist() == [
        [1, 2, 3, 4, 5],
        [1, 2, 3, 6, 0],
        [7, 8, 9, 10, 0],
        [7, 11, 12, 0, 0],
    ]
    assert batch.attention.sum(-1).tolist() == [5, 4, 4, 3]
    sampled = [
        batch.ids[row, 1:][batch.is_sampled[row].bool()].tolist() for row in range(len(batch.ids))
    ]
    assert sampled == [[4, 5], [6], [8, 9, 10], [11, 12]]
    # Each log-probability stands where the logits are that the token was sampled from.
    assert torch.equal(batch.old_log_probs, -batch.ids[:, 1:] * batch.is_sampled)
    parts = list(batch.parts(3))
    assert [where for where, _ in parts] == [slice(0, 3), slice(3, 6)]
    assert torch.equal(torch.cat([part.ids for _, part in parts]), batch.ids)


def test_a_completion_without_a_reward_teaches_nothing() -> None:
    assert advantages_of(GROUPS, over_std=False).tolist() == [0.0, 0.0, -1.0, 1.0]
    over_std = advantages_of(GROUPS, over_std=True).tolist()
    assert over_std == pytest.approx([0.0, 0.0, -(0.5**0.5), 0.5**0.5], abs=1e-3)
    rewards = rewards_of(GROUPS)
    assert rewards.isnan().tolist() == [False, True, False, False]
    batch = Batch.of(GROUPS, pad_token_id=0)
    left = batch.without(rewards.isnan())
    assert left.is_sampled.sum(-1).tolist() == [2, 0, 3, 2]
    assert torch.equal(left.ids, batch.ids)


def test_a_critic_with_other_token_ids_is_refused(base_model: Path, tmp_path: Path) -> None:
    require_same_tokenizer(str(base_model), str(base_model))
    changed = tmp_path / "critic"
    shutil.copytree(base_model, changed)
    tokenizer = AutoTokenizer.from_pretrained(changed)
    tokenizer.add_tokens("<one more>")
    tokenizer.save_pretrained(changed)
    with pytest.raises(ValueError, match=r"critic has another tokenizer than .*; a critic needs"):
        require_same_tokenizer(str(base_model), str(changed))


def test_batches_are_epochs() -> None:
    prompts = [str(number) for number in range(5)]
    batches = list(shuffled(prompts, 2, num_batches=5, seed=1))
    said = [prompt for batch in batches for prompt in batch]
    assert sorted(said[:5]) == sorted(said[5:]) == prompts
    assert batches == list(shuffled(prompts, 2, num_batches=5, seed=1))
    assert batches != list(shuffled(prompts, 2, num_batches=5, seed=2))
    assert [len(batch) for batch in shuffled(prompts, 8, num_batches=2, seed=0)] == [8, 8]


def test_the_clipped_objective_stops_where_it_would_gain_by_going_on() -> None:
    log_probs = torch.tensor([0.0, 0.5, -0.5, 0.5, -0.5], requires_grad=True)
    advantages = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0])
    clipped_loss(log_probs, torch.zeros(5), advantages, 0.2).sum().backward()
    assert log_probs.grad is not None
    moves = (-log_probs.grad).sign().tolist()
    assert moves == [1, 0, 1, -1, 0]


@given(st.lists(st.floats(-5, 0), min_size=2, max_size=6))
def test_the_estimate_of_kl_is_right_on_average(logits: list[float]) -> None:
    policy = torch.tensor(logits).log_softmax(-1)
    reference = torch.zeros(len(logits)).log_softmax(-1)
    estimates = kl_to(policy, reference)
    assert (estimates >= -1e-6).all()
    exact = (policy.exp() * (policy - reference)).sum()
    assert (policy.exp() * estimates).sum() == pytest.approx(float(exact), abs=1e-4)


lengths = st.lists(st.integers(1, 6), min_size=1, max_size=4)


@given(lengths, st.integers(0, 3), st.floats(0, 1), st.integers(0, 2**16))
def test_gae_is_the_discounted_sum_of_its_errors(
    sizes: list[int], prompt: int, gae_lambda: float, seed: int
) -> None:
    """Schulman et al. 2016, eq. 16, with gamma 1: completion by completion."""
    torch.manual_seed(seed)
    width = prompt + max(sizes)
    rewards, values = torch.randn(len(sizes), width), torch.randn(len(sizes), width)
    is_sampled = torch.zeros(len(sizes), width)
    for row, size in enumerate(sizes):
        is_sampled[row, prompt : prompt + size] = 1
    found = gae(rewards * is_sampled, values, is_sampled, gae_lambda)
    assert torch.equal(found * is_sampled, found)
    for row, size in enumerate(sizes):
        r, v = rewards[row, prompt:].tolist(), [*values[row, prompt : prompt + size].tolist(), 0.0]
        for place in range(size):
            errors = [r[t] + v[t + 1] - v[t] for t in range(place, size)]
            expected = sum(gae_lambda**t * error for t, error in enumerate(errors))
            assert float(found[row, prompt + place]) == pytest.approx(expected, abs=1e-4)


def test_a_reward_is_at_the_last_token() -> None:
    batch = Batch.of(GROUPS, pad_token_id=0)
    rewards = with_reward_at_the_end(-batch.is_sampled, rewards_of(GROUPS), batch.is_sampled)
    ends = [
        row[chosen.bool()].tolist() for row, chosen in zip(rewards, batch.is_sampled, strict=True)
    ]
    assert ends == [[-1, 0], [-1], [-1, -1, 1], [-1, 3]]


def test_advantages_are_whitened_over_what_was_sampled() -> None:
    is_sampled = torch.tensor([[0.0, 1, 1, 0], [1, 1, 1, 1]])
    values = whitened(torch.arange(8.0).reshape(2, 4) ** 2, is_sampled)
    chosen = values[is_sampled.bool()]
    assert float(chosen.mean()) == pytest.approx(0, abs=1e-6)
    assert float(chosen.std()) == pytest.approx(1, abs=1e-4)
    assert torch.equal(values * is_sampled, values)


def test_a_value_gains_nothing_by_going_far() -> None:
    old, returns = torch.zeros(3), torch.tensor([1.0, 1.0, -1.0])
    values = torch.tensor([0.1, 0.5, 0.5], requires_grad=True)
    clipped_errors(values, old, returns, 0.2).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == pytest.approx([-0.9, 0.0, 1.5])


@given(st.lists(st.lists(st.floats(-9, 9), min_size=4, max_size=6), min_size=1, max_size=3))
def test_best_of_n_is_the_mean_over_all_choices(rewards: list[list[float]]) -> None:
    found = best_of_n([*rewards, [0.0]], 4)
    assert list(found) == [1, 2, 4]
    for n, value in found.items():
        each = [fmean(max(chosen) for chosen in combinations(of_one, n)) for of_one in rewards]
        assert value == pytest.approx(fmean(each), abs=1e-9)


def test_best_of_n_needs_a_prompt_with_all_its_rewards() -> None:
    with pytest.raises(ValueError, match="no prompt has rewards of all its 4 completions"):
        best_of_n([[1.0, 2.0], []], 4)
