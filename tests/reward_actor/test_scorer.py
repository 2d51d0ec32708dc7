"""A reward depends on its own sequence: not on batch, order, neighbours, grouping or route."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from families import make_network
from hypothesis import given
from hypothesis import strategies as st

from reward_actor import Group, RewardScorer
from reward_actor.model.inferred import contract_for
from reward_actor.model.reward_model import RewardModel

rows = st.lists(st.lists(st.integers(0, 299), min_size=1, max_size=40), min_size=1, max_size=8)


@pytest.fixture(scope="module")
def scorer(export_dir: Path) -> RewardScorer:
    """Without a cache: what is scored in company must not be remembered from alone."""
    return RewardScorer.from_pretrained(export_dir, "cpu", cache_size=0)


@given(sequences=rows, budget=st.integers(1, 300))
def test_a_sequence_scores_the_same_in_any_company(
    scorer: RewardScorer, sequences: list[list[int]], budget: int
) -> None:
    alone = [float(scorer.score_ids([row])[0]) for row in sequences]
    together = RewardScorer(scorer.members, max_batch_tokens=budget).score_ids(sequences)
    assert together.dtype == np.float32
    assert together.tolist() == pytest.approx(alone, abs=1e-5)


def test_text_messages_and_ids_are_one_route(scorer: RewardScorer) -> None:
    completions = ["An apple.", "", "A hammer and a pear."]
    render = scorer.renderer
    prompt_ids = render.prompt_ids("Name a fruit.")
    groups = [
        Group("Name a fruit.", completions),
        Group([{"role": "user", "content": "Name a fruit."}], completions),
        Group(
            prompt_ids=prompt_ids,
            completion_ids=[
                render.render("Name a fruit.", text)[len(prompt_ids) :] for text in completions
            ],
        ),
    ]
    text, messages, ids = scorer.score(groups)
    for scores in (messages, ids):
        assert scores.rewards == pytest.approx(text.rewards, abs=1e-5)
        assert scores.num_tokens == text.num_tokens
    assert text.errors == [None, None, None]


def test_the_last_token_reward_is_the_reward(scorer: RewardScorer) -> None:
    sequences = [[5, 6, 7], [8], list(range(40))]
    per_token = scorer.token_rewards(sequences)
    assert [len(row) for row in per_token] == [3, 1, 40]
    last = [float(row[-1]) for row in per_token]
    assert last == pytest.approx(scorer.score_ids(sequences).tolist(), abs=1e-5)
    [scores] = scorer.score([Group("Hi.", ["Yes?", "a\ud800"])], token_rewards=True)
    assert scores.token_rewards is not None
    assert scores.token_rewards[0] is not None
    assert scores.token_rewards[0][-1] == pytest.approx(scores.rewards[0], abs=1e-5)
    assert scores.token_rewards[1] is None


def test_one_bad_sample_leaves_the_others_alone(scorer: RewardScorer) -> None:
    good = scorer.score([Group(prompt_ids=[5], completion_ids=[[6]])])[0].rewards[0]
    [scores] = scorer.score([Group(prompt_ids=[5], completion_ids=[[10**6], [6], [7] * 300])])
    assert [error and error.type for error in scores.errors] == [
        "token_out_of_vocabulary",
        None,
        "too_long",
    ]
    assert scores.rewards == [None, pytest.approx(good, abs=1e-5), None]


def test_score_ids_names_the_bad_sequence(scorer: RewardScorer) -> None:
    with pytest.raises(ValueError, match="sequence 1: the sample has no tokens"):
        scorer.score_ids([[5], []])


def test_no_groups_and_empty_groups_are_fine(scorer: RewardScorer) -> None:
    assert scorer.score([]) == []
    assert scorer.score([Group("Hi.", [])])[0].rewards == []
    assert scorer.score_ids([]).shape == (0,)


def test_normalisation_shifts_and_scales(scorer: RewardScorer) -> None:
    from dataclasses import replace

    contract = replace(scorer.contract, mean=0.5, std=2.0)
    normalised = RewardScorer([replace(scorer.members[0], contract=contract)])
    [raw], [scores] = (s.score([Group("Hi.", ["Yes?"])]) for s in (scorer, normalised))
    assert scores.raw_scores == raw.raw_scores
    assert scores.rewards[0] == pytest.approx((raw.rewards[0] - 0.5) / 2.0)


def test_a_group_is_text_or_ids() -> None:
    for wrong in ({}, {"prompt": "a", "prompt_ids": [1]}, {"prompt": "a", "completion_ids": [[1]]}):
        with pytest.raises(ValueError, match="prompt"):
            Group(**wrong)


def test_bfloat16_stays_within_its_recorded_bound(export_dir: Path, scorer: RewardScorer) -> None:
    half = RewardScorer.from_pretrained(export_dir, "cpu", "bfloat16")
    assert half.model_version != scorer.model_version
    bound = half.contract.golden.tolerance["bfloat16"]
    assert 1e-3 <= bound < 1.0
    groups = [Group("Name two fruits.", ["An apple.", "No, thank you.", "A pear and a plum."])]
    exact, rough = scorer.score(groups)[0], half.score(groups)[0]
    assert rough.rewards == pytest.approx(exact.rewards, abs=bound)


def test_a_contract_longer_than_the_network_can_score_is_refused(scorer: RewardScorer) -> None:
    """Beyond their first length dynamic rotary positions depend on what was scored before."""
    member = scorer.members[0]
    dynamic = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}
    dynamic["original_max_position_embeddings"] = 64
    network = make_network("llama", max_position_embeddings=256, rope_parameters=dynamic)
    model = RewardModel(network).eval()
    assert contract_for(member.tokenizer, network.config, format="text").max_length == 64
    short, long = (
        replace(member, model=model, contract=replace(member.contract, max_length=max_length))
        for max_length in (64, 65)
    )
    assert RewardScorer([short]).contract.max_length == 64
    with pytest.raises(ValueError, match="set max_length to that"):
        RewardScorer([long])
