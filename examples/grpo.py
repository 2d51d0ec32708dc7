"""GRPO on Ray, to be read: rollout pool -> reward model -> policy update -> weights into the pool.

    python examples/grpo.py outputs/demo/policy outputs/demo/data/train.jsonl outputs/grpo \\
        --scorer outputs/demo/reward-model/export

Each step samples a group of completions for some prompts, has them scored where they are made,
takes one gradient step by each completion's advantage over its group, with a penalty for leaving
the first policy, and samples with the new weights from then on. After `make demo` the command above
raises the reward of the demo's policy.

Shao et al. 2024, arXiv 2402.03300; with --no-std advantages as Liu et al. 2025, arXiv 2503.20783,
have them. The loss is averaged over all tokens of a step (Yu et al. 2025, arXiv 2503.14476, 3.3).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
import torch
from policy_gradient import (
    Log,
    clipped_loss,
    kl_to,
    options,
    policy_and_reference,
    rewards_of,
    rollouts,
    save,
    trained,
    with_pool,
)

from reward_actor.rollout import RolloutGroup, RolloutPool
from reward_actor.shaping import group_advantages


def train(args: argparse.Namespace, pool: RolloutPool) -> None:
    """pool: begins with the policy's weights, and ends with the trained ones."""
    network, reference = policy_and_reference(args)
    policy = trained(network, args.learning_rate, deepspeed=args.deepspeed)
    log = Log(args.out)
    for step, (groups, batch) in enumerate(rollouts(args, pool)):
        advantages = advantages_of(groups, over_std=not args.no_std).to(args.device)
        batch = batch.without(rewards_of(groups).isnan().to(args.device))
        num_tokens = batch.is_sampled.sum()
        total_kl = 0.0
        for where, part in batch.parts(args.part):
            with torch.no_grad():
                reference_log_probs = part.log_probs(reference)
            log_probs = part.log_probs(policy.forward)
            gain = clipped_loss(log_probs, part.old_log_probs, advantages[where, None], args.clip)
            kl = kl_to(log_probs, reference_log_probs)
            loss = part.sum(gain + args.kl * kl) / num_tokens
            policy.backward(loss, is_last=where.stop >= len(batch.ids))
            total_kl += float(part.sum(kl.detach()))
        norm = policy.step()
        pool.update_weights(network.state_dict())
        log.step(step, groups, kl=total_kl / float(num_tokens), gradient_norm=norm)
    save(network, args)


def advantages_of(groups: Sequence[RolloutGroup], *, over_std: bool) -> torch.Tensor:
    """(B,) of all completions, group after group; 0 for one without a reward."""
    rewards = np.array([group.rewards for group in groups], np.float64)
    advantages = np.nan_to_num(group_advantages(rewards, over_std=over_std))
    return torch.tensor(advantages.ravel(), dtype=torch.float32)


def parser() -> argparse.ArgumentParser:
    made = options((__doc__ or "").partition("\n")[0])
    made.add_argument("--no-std", action="store_true", help="advantages without the deviation")
    return made


if __name__ == "__main__":
    with_pool(parser(), train)
