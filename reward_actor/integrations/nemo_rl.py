"""An environment for NeMo-RL.

NeMo-RL starts environments as Ray actors; put these lines in a file of yours, my_file.py, which
your copy of examples/run_grpo.py imports before the environments are made:

    import ray
    from nemo_rl.distributed.ray_actor_environment_registry import ACTOR_ENVIRONMENT_REGISTRY
    from nemo_rl.distributed.virtual_cluster import PY_EXECUTABLES
    from nemo_rl.environments.utils import register_env
    from reward_actor.integrations.nemo_rl import RewardEnvironment

    RaywardEnvironment = ray.remote(RewardEnvironment)
    register_env("rayward", "my_file.RaywardEnvironment")
    ACTOR_ENVIRONMENT_REGISTRY["my_file.RaywardEnvironment"] = PY_EXECUTABLES.SYSTEM

Without the last line, which says what Python runs the actor, NeMo-RL refuses to start it. Name the
environment in the configuration:

    data: {default: {env_name: rayward}}
    env:
      rayward:
        url: http://127.0.0.1:8000                # or several, with commas; or $RAYWARD_URL
        prompt_key: messages                      # see below

NeMo-RL's own data processors write the prompt into the message log with the policy's chat template
around it, which must not be put into the reward model's template once more. Let your processor
leave the prompt as it was, text or messages, in `extra_env_info`, and name its key as prompt_key.
Without prompt_key the contents of the log are taken as the messages. `tools` and
`chat_template_kwargs` in `extra_env_info` go to the reward model's chat template. A conversation is
rewarded at its end, with `turn_rewards: mean` (sum, min) for all assistant turns of its log. A
sample without a reward (too long, say) is an error, unless `error_reward` names the reward that it
shall have. `reward_names: [helpful, correct]` gives these named rewards, each by itself as
`reward/helpful` and so on, which GDPO takes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import dropwhile
from typing import Any, NamedTuple

from reward_actor.conversation import as_messages
from reward_actor.groups import LOGGED_AS, Message, Prompt
from reward_actor.integrations.grouping import checked_rule, counted, to_groups, wanted
from reward_actor.integrations.scorers import client, url_or_variable


class Step(NamedTuple):
    """NeMo-RL's EnvironmentReturn for n samples: rewards (n,) float32, or such by names;
    terminateds (n,) bool."""

    observations: list[dict[str, str]]
    metadata: list[Any]
    next_stop_strings: list[None]
    rewards: Any
    terminateds: Any
    answers: list[str]


class RewardEnvironment:
    """One step for each conversation: the service's reward of its last message."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        """config: url, prompt_key, error_reward, turn_rewards, reward_names; all optional. Raises
        ValueError."""
        self._url = url_or_variable(config.get("url"))
        client(self._url)  # raises now rather than at the first step
        self._prompt_key = config.get("prompt_key")
        self._error_reward = config.get("error_reward")
        self._rule = checked_rule(config.get("turn_rewards"))
        self._names = list(config.get("reward_names") or ())
        if self._names and self._rule:
            raise ValueError("reward_names are of a conversation's end; leave turn_rewards out")

    def step(
        self,
        message_log_batch: Sequence[Sequence[Mapping[str, Any]]],
        metadata: Sequence[Mapping[str, Any] | None],
    ) -> Step:
        """The rewards of n conversations that end with a completion. Raises RewardServiceError,
        and ValueError where the metadata hold no prompt."""
        import torch

        prompts = [self._prompt(*both) for both in zip(message_log_batch, metadata, strict=True)]
        told = (
            [(info or {}).get(name) for info in metadata]
            for name in ("tools", "chat_template_kwargs")
        )
        groups, samples = to_groups(prompts, [log[-1:] for log in message_log_batch], *told)
        scores = client(self._url).score_groups(groups, **wanted(self._rule))
        rewarded = samples.over_turns(scores, message_log_batch, self._rule)
        chosen = samples.chosen(rewarded, self._error_reward)
        rewards: Any = torch.tensor(chosen, dtype=torch.float32)
        if self._names:
            named = {name: samples.named(scores, name, counted) for name in self._names}
            rewards = {
                LOGGED_AS.format(name): torch.tensor(
                    [one if v is None else v for v, one in zip(values, chosen, strict=True)]
                )
                for name, values in named.items()
            }
        n = len(message_log_batch)
        return Step(
            observations=[{"role": "environment", "content": ""} for _ in range(n)],
            metadata=[None] * n,
            next_stop_strings=[None] * n,
            rewards=rewards,
            terminateds=torch.ones(n, dtype=torch.bool),
            answers=[str(log[-1]["content"] or "") for log in message_log_batch],
        )

    def global_post_process_and_metrics(self, batch: Any) -> tuple[Any, dict[str, Any]]:
        """The batch as it is, and figures of its rewards."""
        rewards = batch.get("rewards")
        if rewards is None or not len(rewards):
            return batch, {}
        return batch, {
            "rayward/mean_reward": float(rewards.mean()),
            "rayward/min_reward": float(rewards.min()),
            "rayward/max_reward": float(rewards.max()),
        }

    def shutdown(self) -> None:
        """Nothing to do: the service is not ours to end."""

    def _prompt(
        self, log: Sequence[Mapping[str, Any]], metadata: Mapping[str, Any] | None
    ) -> Prompt:
        earlier: list[Message] = list(log[:-1])
        if self._prompt_key is None:
            return earlier
        prompt = (metadata or {}).get(self._prompt_key)
        if prompt is None:
            raise ValueError(
                f"extra_env_info has no {self._prompt_key!r}, which prompt_key names; let your "
                "data processor put the prompt there"
            )
        # What stands before the policy's first turn is the prompt once more, templated: in one
        # message, or in two where NeMo-RL's processors have a system prompt.
        turns = list(dropwhile(lambda message: message["role"] != "assistant", earlier))
        if not turns:
            return prompt if isinstance(prompt, str) else list(prompt)
        return [*as_messages(prompt), *turns]
