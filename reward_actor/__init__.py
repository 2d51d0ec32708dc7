"""Everything that decides a reward's value: contract, rendering, packing, pooling, scoring.

The names below load on first use, so that `from reward_actor import RewardClient` needs neither
torch nor ray.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reward_actor.client.handle import AsyncRewardHandle, RewardHandle
    from reward_actor.client.sync import AsyncRewardClient, RewardClient
    from reward_actor.errors import RewardServiceError
    from reward_actor.groups import Group, GroupScores, SampleError, Whole
    from reward_actor.model.reward_model import get_reward
    from reward_actor.scorer import RewardScorer

_HOME = {
    "AsyncRewardClient": "reward_actor.client.sync",
    "AsyncRewardHandle": "reward_actor.client.handle",
    "Group": "reward_actor.groups",
    "GroupScores": "reward_actor.groups",
    "RewardClient": "reward_actor.client.sync",
    "RewardHandle": "reward_actor.client.handle",
    "RewardScorer": "reward_actor.scorer",
    "RewardServiceError": "reward_actor.errors",
    "SampleError": "reward_actor.groups",
    "Whole": "reward_actor.groups",
    "get_reward": "reward_actor.model.reward_model",
}
__all__ = [
    "AsyncRewardClient",
    "AsyncRewardHandle",
    "Group",
    "GroupScores",
    "RewardClient",
    "RewardHandle",
    "RewardScorer",
    "RewardServiceError",
    "SampleError",
    "Whole",
    "get_reward",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'reward_actor' has no attribute {name!r}")
