"""The clients and the real service: the right rewards, an error for each sample."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from samples import GROUPS, IDS

from reward_actor import AsyncRewardClient, Group, RewardClient, RewardScorer
from reward_actor.errors import RewardServiceError


def test_ids_text_and_whole_texts_give_the_offline_rewards(
    service: str, offline: RewardScorer
) -> None:
    sequences = [ids for group in [*IDS, *GROUPS] for ids in offline.renderer.sequences(group)]
    expected = offline.score_ids([ids for ids in sequences if isinstance(ids, list)])
    with RewardClient(service) as client:
        scores = [*client.score_groups(IDS), *client.score_groups(GROUPS)]
        info = client.info()
    rewards = [reward for group in scores for reward in group.rewards]
    assert rewards == pytest.approx(expected, abs=1e-5)
    assert {group.model_version for group in scores} == {offline.model_version}
    assert info.model_version == offline.model_version


def test_token_rewards_come_with_their_tokens(service: str) -> None:
    async def both() -> Any:
        async with AsyncRewardClient(service) as client:
            return await client.token_rewards("Hi.", ["Hello!", "What?"])

    with RewardClient(service) as client:
        for scores in (client.token_rewards("Hi.", ["Hello!", "What?"]), asyncio.run(both())):
            assert "Hello!" in "".join(scores.tokens[0])
            for row, tokens, reward in zip(
                scores.token_rewards, scores.tokens, scores.rewards, strict=True
            ):
                assert len(row) == len(tokens)
                assert row[-1] == pytest.approx(reward, abs=1e-6)
        [of_ids] = client.score_groups(IDS, token_rewards=True)
        assert [row and len(row) for row in of_ids.token_rewards or []] == [4, 5, 3]


def test_a_thousand_calls_at_once_are_right(service: str, offline: RewardScorer) -> None:
    groups = [Group(prompt_ids=[5], completion_ids=[[n % 300 + 6]]) for n in range(1000)]
    expected = [group.rewards[0] for group in offline.score(groups)]

    async def all_at_once() -> list[float | None]:
        async with AsyncRewardClient(service) as client:
            scores = await asyncio.gather(*(client.score_groups([group]) for group in groups))
        return [score.rewards[0] for [score] in scores]

    assert asyncio.run(all_at_once()) == pytest.approx(expected, abs=1e-5)
    with RewardClient(service) as client, ThreadPoolExecutor(32) as threads:
        scores = threads.map(lambda group: client.score_groups([group])[0], groups[:200])
        assert [s.rewards[0] for s in scores] == pytest.approx(expected[:200], abs=1e-5)


def test_a_sample_that_cannot_be_scored_is_an_error_of_its_own(service: str) -> None:
    with RewardClient(service) as client:
        scores = client.score("Hi.", ["fine", "word " * 500, "\ud800"])
    assert [e and e.type for e in scores.errors] == [None, "too_long", "unrenderable"]


def test_a_service_without_a_registry_says_so(service: str) -> None:
    with RewardClient(service) as client, pytest.raises(RewardServiceError) as refused:
        client.models()
    assert refused.value.type == "not_found"
    assert "--registry" in refused.value.message
