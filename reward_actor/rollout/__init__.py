"""vLLM actors that sample completions and have them scored."""

from reward_actor.rollout.actor import RolloutActor
from reward_actor.rollout.policy import longest_needed
from reward_actor.rollout.pool import sample, start_rollout_actors
from reward_actor.rollout.records import RolloutGroup, Sampling, VllmSettings

__all__ = [
    "RolloutActor",
    "RolloutGroup",
    "Sampling",
    "VllmSettings",
    "longest_needed",
    "sample",
    "start_rollout_actors",
]
