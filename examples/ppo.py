"""PPO on Ray, to be read: `grpo.py` with a critic.

    python examples/ppo.py outputs/demo/policy outputs/demo/data/train.jsonl outputs/ppo \\
        --scorer outputs/demo/reward-model/export --critic outputs/demo/reward-model/export

A critic, which begins as the reward model, says at each token what reward is to be expected, and
generalized advantage estimation what each token changed. The distance to the first policy is taken
off each token's reward.

Schulman et al. 2017, arXiv 1707.06347; for language models Ouyang et al. 2022, arXiv 2203.02155;
GAE: Schulman et al. 2016, arXiv 1506.02438.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from policy_gradient import (
    Batch,
    Log,
    clipped_loss,
    options,
    policy_and_reference,
    rewards_of,
    rollouts,
    save,
    trained,
    with_pool,
)
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from reward_actor.contract import ScoringContract
from reward_actor.rollout import RolloutPool


class Critic(nn.Module):
    """A reward model that is read at every token instead of at the last one."""

    def __init__(self, directory: str) -> None:
        super().__init__()
        self.network = AutoModelForSequenceClassification.from_pretrained(
            directory, dtype=torch.float32
        )
        contract = ScoringContract.load(Path(directory))
        # Its first values are rewards, as the policy gets them.
        self.mean, self.std = (contract.mean, contract.std) if contract else (0.0, 1.0)

    def forward(self, batch: Batch) -> Tensor:
        """(B, T - 1): the reward that is to be expected before each next token."""
        backbone = getattr(self.network, self.network.base_model_prefix)
        hidden = backbone(input_ids=batch.ids, attention_mask=batch.attention).last_hidden_state
        scores: Tensor = self.network.score(hidden)[:, :-1, 0]
        return (scores - self.mean) / self.std


def train(args: argparse.Namespace, pool: RolloutPool) -> None:
    """pool: begins with the policy's weights, and ends with the trained ones."""
    network, reference = policy_and_reference(args)
    policy = trained(network, args.learning_rate, deepspeed=args.deepspeed)
    require_same_tokenizer(args.policy, args.critic)
    critic_network = Critic(args.critic).to(args.device)
    critic = trained(critic_network, args.critic_learning_rate, deepspeed=args.deepspeed)
    log = Log(args.out)
    for step, (groups, batch) in enumerate(rollouts(args, pool)):
        rewards = rewards_of(groups).to(args.device)
        batch = batch.without(rewards.isnan())
        with torch.no_grad():
            parts = [part for _, part in batch.parts(args.part)]
            reference_log_probs = torch.cat([part.log_probs(reference) for part in parts])
            old_values = torch.cat([critic_network(part) for part in parts])
        kl = (batch.old_log_probs - reference_log_probs) * batch.is_sampled
        per_token = with_reward_at_the_end(-args.kl * kl, rewards, batch.is_sampled)
        advantages = gae(per_token, old_values, batch.is_sampled, args.gae_lambda)
        returns = advantages + old_values
        advantages = whitened(advantages, batch.is_sampled)
        num_tokens = batch.is_sampled.sum()
        figures = {"kl": float(kl.sum() / num_tokens)}
        for _ in range(args.epochs):
            value_loss = 0.0
            for where, part in batch.parts(args.part):
                is_last = where.stop >= len(batch.ids)
                gain = clipped_loss(
                    part.log_probs(policy.forward),
                    part.old_log_probs,
                    advantages[where],
                    args.clip,
                )
                policy.backward(part.sum(gain) / num_tokens, is_last=is_last)
                errors = clipped_errors(
                    critic.forward(part), old_values[where], returns[where], args.clip
                )
                loss = part.sum(errors) / num_tokens
                critic.backward(loss, is_last=is_last)
                value_loss += float(loss.detach())
            figures |= {"gradient_norm": policy.step(), "value_loss": value_loss}
            critic.step()
        pool.update_weights(network.state_dict())
        log.step(step, groups, **figures)
    save(network, args)


def require_same_tokenizer(policy: str, critic: str) -> None:
    """Raise ValueError unless the critic reads the policy's token ids as the policy does."""
    vocabularies = [AutoTokenizer.from_pretrained(each).get_vocab() for each in (policy, critic)]
    if vocabularies[0] != vocabularies[1]:
        raise ValueError(f"{critic} has another tokenizer than {policy}; a critic needs the same")


def with_reward_at_the_end(per_token: Tensor, rewards: Tensor, is_sampled: Tensor) -> Tensor:
    """Add a completion's reward (B,) to what its last token has (B, T - 1)."""
    places = torch.arange(is_sampled.shape[1], device=is_sampled.device)
    last = (is_sampled * places).argmax(-1)
    end = torch.zeros_like(per_token)
    end[torch.arange(len(last)), last] = rewards.nan_to_num()
    return per_token + end * is_sampled


def gae(rewards: Tensor, values: Tensor, is_sampled: Tensor, gae_lambda: float) -> Tensor:
    """Generalized advantage estimation without a discount, all (B, T - 1); 0 where nothing was
    sampled."""
    advantages = torch.zeros_like(rewards)
    following, next_value = torch.zeros_like(rewards[:, 0]), torch.zeros_like(values[:, 0])
    for place in reversed(range(rewards.shape[1])):
        here = is_sampled[:, place]
        delta = rewards[:, place] + next_value - values[:, place]
        following = here * (delta + gae_lambda * following)
        next_value = here * values[:, place]
        advantages[:, place] = following
    return advantages


def whitened(values: Tensor, is_sampled: Tensor) -> Tensor:
    """With mean 0 and deviation 1 over the tokens that were sampled."""
    chosen = values[is_sampled.bool()]
    return (values - chosen.mean()) / (chosen.std() + 1e-8) * is_sampled


def clipped_errors(values: Tensor, old: Tensor, returns: Tensor, clip: float) -> Tensor:
    """Half the squared error of each value, which gains nothing by going far from the old one."""
    near = old + (values - old).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns) ** 2, (near - returns) ** 2)


def parser() -> argparse.ArgumentParser:
    made = options((__doc__ or "").partition("\n")[0])
    add = made.add_argument
    add("--critic", required=True, help="directory of a reward model, with the policy's tokenizer")
    add("--critic-learning-rate", type=float, default=3e-4)
    add("--gae-lambda", type=float, default=0.95)
    add("--epochs", type=int, default=2, help="updates by the same rollouts")
    return made


if __name__ == "__main__":
    with_pool(parser(), train)
