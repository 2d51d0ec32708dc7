"""Clients of the reward service over HTTP and over a Ray handle. Those over HTTP load no Ray."""

from reward_actor.client.aio import AsyncRewardClient
from reward_actor.client.sync import RewardClient

__all__ = ["AsyncRewardClient", "RewardClient"]
