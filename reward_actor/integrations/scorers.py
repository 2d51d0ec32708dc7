"""What the adapters score with: the client of an address."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from typing import Protocol

from reward_actor.client.sync import AsyncRewardClient, RewardClient
from reward_actor.groups import Group, GroupScores, Whole

URL_VARIABLE = "RAYWARD_URL"


class Scorer(Protocol):
    """A `RewardClient`, a `RewardHandle`, or whatever else scores groups."""

    def score_groups(
        self, groups: Sequence[Group | Whole], *, turn_rewards: bool = False
    ) -> list[GroupScores]: ...


class AsyncScorer(Protocol):
    """An `AsyncRewardClient`, an `AsyncRewardHandle`, or whatever else scores groups."""

    async def score_groups(
        self, groups: Sequence[Group | Whole], *, turn_rewards: bool = False
    ) -> list[GroupScores]: ...


def url_or_variable(url: str | None) -> str:
    """The address, by default that of $RAYWARD_URL. Raises ValueError where there is neither."""
    url = url or os.environ.get(URL_VARIABLE)
    if not url:
        raise ValueError(f"no address of a service: set {URL_VARIABLE}=http://HOST:PORT")
    return url


@cache
def client(url: str) -> RewardClient:
    """One for a process: calls of many threads are merged. It lives as long as the process."""
    return RewardClient(url)


@cache
def async_client(url: str) -> AsyncRewardClient:
    """One for a process, in whichever event loops call."""
    return AsyncRewardClient(url)
