"""The step of a SkyRL environment.

SkyRL wants environments derived from its own class; put these lines in a file of yours:

    from skyrl_gym.envs.base_text_env import BaseTextEnv
    from reward_actor.integrations.skyrl import RewardStep

    class RewardEnv(RewardStep, BaseTextEnv):
        pass

register it inside the entry point's task

    skyrl_gym.envs.register(id="rayward", entry_point="my_file:RewardEnv")

and run with

    export RAYWARD_URL=http://127.0.0.1:8000      # or several, with commas
    ... environment.env_class=rayward

The prompt is what `init` is given, the completion what the one `step` is given. A sample without a
reward (too long, say) is an error, unless the environment's configuration or the data's extras name
an `error_reward`; `tools` and `chat_template_kwargs` there go to the reward model's chat template.
With `turn_rewards` ("mean", "sum", "min") there, the step's metadata have the rewards of all
assistant turns, the prompt's and then the completion's; of the completion, which is one turn, any
of these rules makes its reward. Named rewards, of an ensemble or of several heads, are in the
metadata, and as `reward/NAME` in the metrics.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from reward_actor.groups import LOGGED_AS, Message
from reward_actor.integrations.grouping import checked_rule, to_groups, wanted
from reward_actor.integrations.scorers import client, url_or_variable


class RewardStep:
    """`init` and `step` of a single-turn environment whose reward is the service's."""

    def __init__(self, env_config: Any = None, extras: Mapping[str, Any] | None = None) -> None:
        """env_config, extras: may hold `url`, `error_reward`, `tools`, `chat_template_kwargs` and
        `turn_rewards`; extras win. Raises ValueError."""
        super().__init__()
        self._url = url_or_variable(_setting("url", env_config, extras))
        client(self._url)  # raises now rather than at the first step
        error_reward = _setting("error_reward", env_config, extras)
        self._error_reward = None if error_reward is None else float(error_reward)
        self._told = [
            [_setting(name, env_config, extras)] for name in ("tools", "chat_template_kwargs")
        ]
        self._rule = checked_rule(_setting("turn_rewards", env_config, extras))
        self._prompt: list[Message] = []
        self._num_tokens = 0
        self._named: dict[str, float | None] = {}

    def init(self, prompt: Sequence[Message]) -> tuple[list[Message], dict[str, Any]]:
        """Remember the prompt and hand it on."""
        self._prompt = list(prompt)
        return self._prompt, {}

    def step(self, action: str) -> dict[str, Any]:
        """The reward of the completion; the episode ends. Raises RewardServiceError."""
        groups, samples = to_groups([self._prompt], [action], *self._told)
        scores = client(self._url).score_groups(groups, **wanted(self._rule))
        [reward] = samples.chosen(scores, self._error_reward)
        self._num_tokens = scores[0].num_tokens[0]
        metadata: dict[str, Any] = {"model_version": scores[0].model_version}
        named = scores[0].named_rewards or {}
        self._named = {name: values[0] for name, values in named.items()}
        if named:
            metadata["named_rewards"] = self._named
        if scores[0].turn_rewards is not None:
            metadata["turn_rewards"] = scores[0].turn_rewards[0]
        return {"observations": [], "reward": reward, "done": True, "metadata": metadata}

    def get_metrics(self) -> dict[str, Any]:
        known = {
            LOGGED_AS.format(name): reward
            for name, reward in self._named.items()
            if reward is not None
        }
        return {"reward_model_tokens": self._num_tokens, **known}


def _setting(name: str, env_config: Any, extras: Mapping[str, Any] | None) -> Any:
    if extras is not None and extras.get(name) is not None:
        return extras[name]
    if isinstance(env_config, Mapping):
        return env_config.get(name)
    return getattr(env_config, name, None)
