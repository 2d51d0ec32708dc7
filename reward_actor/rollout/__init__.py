"""vLLM actors that sample completions and have them scored."""

from reward_actor.rollout.pool import RolloutPool, rollout
from reward_actor.rollout.records import RolloutGroup, Sampling, VllmSettings

__all__ = ["RolloutGroup", "RolloutPool", "Sampling", "VllmSettings", "rollout"]
