"""The function file of OpenRLHF.

    export RAYWARD_URL=http://127.0.0.1:8000      # or several, with commas
    python3 -m openrlhf.cli.train_ppo_ray ... \\
        --reward.remote_url "$(python -c \\
            'import reward_actor.integrations.openrlhf as f; print(f.__file__)')"

(`--remote_rm_url` in older versions.) OpenRLHF can also ask the service directly, by
`--reward.remote_url http://127.0.0.1:8000/get_reward`; this file adds what its own client lacks:
connections that stay, the token of $RAYWARD_TOKEN, several addresses with failover, and merged
requests where many rollouts end together.

OpenRLHF has put the texts into the policy's chat template already, so they are scored as they are:
policy and reward model must share it. A sample without a reward (too long, say) is an error, unless
$RAYWARD_ERROR_REWARD names the reward that it shall have. OpenRLHF logs the error and ends in its
next step, where it misses the reward.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from reward_actor.groups import LOGGED_AS, Whole, joined
from reward_actor.integrations.grouping import counted, rewards_of
from reward_actor.integrations.scorers import client, url_or_variable

ERROR_REWARD_VARIABLE = "RAYWARD_ERROR_REWARD"


def reward_func(
    queries: Sequence[str], prompts: Sequence[str], labels: Sequence[Any], **ignored: Any
) -> dict[str, Any]:
    """Rewards of whole texts, prompt and completion: {"rewards", "scores"}, tensors (n,), and
    {"extra_logs": {name: tensor (n,)}}, with named rewards as `reward/NAME`. Raises
    RewardServiceError."""
    import torch

    error_reward = os.environ.get(ERROR_REWARD_VARIABLE)
    scorer = client(url_or_variable(None))
    scores = scorer.score_groups([Whole([query]) for query in queries])
    chosen = rewards_of(scores, None if error_reward is None else float(error_reward))
    rewards = torch.tensor([reward for [reward] in chosen], dtype=torch.float32)
    num_tokens = [float(n) for group in scores for n in group.num_tokens]
    failed = [float(error is not None) for group in scores for error in group.errors]
    # Where a sample has no reward, its `error_reward` stands for each of them.
    named = {}
    if scores:
        whole = joined(scores)
        named = {
            name: [
                reward if value is None else value
                for [reward], value in zip(chosen, counted(whole, name), strict=True)
            ]
            for name in whole.named_rewards or ()
        }
    return {
        "rewards": rewards,
        "scores": rewards,
        "extra_logs": {
            "reward_model_tokens": torch.tensor(num_tokens),
            "without_reward": torch.tensor(failed),
            **{LOGGED_AS.format(name): torch.tensor(values) for name, values in named.items()},
        },
    }
