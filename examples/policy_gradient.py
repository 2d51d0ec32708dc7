"""What `grpo.py` and `ppo.py` share: batches of rollouts as tensors, log-probabilities, the steps.

Shapes: B completions of a batch, T tokens of the longest prompt with its completion.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from reward_actor.files import prompt_of, read_rows
from reward_actor.groups import Prompt
from reward_actor.rollout import RolloutGroup, RolloutPool, Sampling, VllmSettings

# What DeepSpeed wants to know, where no launcher tells it; port 0 is a free one.
_ONE_PROCESS = {
    "RANK": "0",
    "WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "0",
}


@dataclass(frozen=True)
class Batch:
    """Completions after their prompts, padded on the right.

    ids            (B, T) token ids.
    attention      (B, T) 1 where a token is.
    is_sampled     (B, T - 1) 1 where the next token is one that the policy sampled.
    old_log_probs  (B, T - 1) of those, as the policy had them when it sampled.
    """

    ids: Tensor
    attention: Tensor
    is_sampled: Tensor
    old_log_probs: Tensor

    @classmethod
    def of(cls, groups: Sequence[RolloutGroup], pad_token_id: int) -> Batch:
        rows = [
            (group.prompt_ids, ids, log_probs)
            for group in groups
            for ids, log_probs in zip(group.completion_ids, group.log_probs, strict=True)
        ]
        width = max(len(prompt) + len(ids) for prompt, ids, _ in rows)
        batch = cls(
            torch.full((len(rows), width), pad_token_id),
            torch.zeros(len(rows), width, dtype=torch.long),
            torch.zeros(len(rows), width - 1),
            torch.zeros(len(rows), width - 1),
        )
        for row, (prompt, ids, log_probs) in enumerate(rows):
            end = len(prompt) + len(ids)
            batch.ids[row, :end] = torch.tensor(prompt + ids)
            batch.attention[row, :end] = 1
            # The logits at a place are of the token after it.
            batch.is_sampled[row, len(prompt) - 1 : end - 1] = 1
            batch.old_log_probs[row, len(prompt) - 1 : end - 1] = torch.tensor(log_probs)
        return batch

    def without(self, left_out: Tensor) -> Batch:
        """Nothing is learned of these completions (B,)."""
        kept = (~left_out).to(self.is_sampled)[:, None]
        return replace(self, is_sampled=self.is_sampled * kept)

    def to(self, device: str) -> Batch:
        return Batch(*(tensor.to(device) for tensor in vars(self).values()))

    def parts(self, size: int) -> Iterator[tuple[slice, Batch]]:
        """Of so many completions, and where they are."""
        for begin in range(0, len(self.ids), size):
            where = slice(begin, begin + size)
            yield where, Batch(*(tensor[where] for tensor in vars(self).values()))

    def log_probs(self, policy: Callable[..., Any]) -> Tensor:
        """(B, T - 1) of each next token."""
        logits = policy(input_ids=self.ids, attention_mask=self.attention).logits[:, :-1]
        chosen: Tensor = logits.float().log_softmax(-1).gather(-1, self.ids[:, 1:, None])
        return chosen[..., 0]

    def sum(self, values: Tensor) -> Tensor:
        """Over the tokens that were sampled."""
        return (values * self.is_sampled).sum()


def clipped_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, clip: float
) -> Tensor:
    """PPO's clipped objective for each token, to be minimized (Schulman et al. 2017, arXiv
    1707.06347, eq. 7)."""
    ratio = (log_probs - old_log_probs).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)


def kl_to(log_probs: Tensor, reference: Tensor) -> Tensor:
    """An estimate of KL(policy || reference) at each token that is unbiased and at least 0
    (Schulman 2020, "Approximating KL divergence", k3)."""
    difference = reference - log_probs
    return difference.exp() - difference - 1


def policy_and_reference(args: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The policy in float32, as it is trained, and a copy that stays as it is."""
    torch.manual_seed(args.seed)
    loaded: Any = AutoModelForCausalLM.from_pretrained(args.policy, dtype=torch.float32)
    policy: PreTrainedModel = loaded.to(args.device)
    return policy, copy.deepcopy(policy).eval().requires_grad_(False)


def save(policy: PreTrainedModel, args: argparse.Namespace) -> None:
    """With its tokenizer, as a policy of its own."""
    policy.save_pretrained(args.out)
    AutoTokenizer.from_pretrained(args.policy).save_pretrained(args.out)


def trained(module: nn.Module, learning_rate: float, *, deepspeed: bool) -> Trained:
    """With AdamW, gradients clipped at 1; deepspeed: by its ZeRO-2 engine."""
    optimizer = torch.optim.AdamW(module.parameters(), learning_rate, weight_decay=0.0)
    if not deepspeed:
        return Trained(module, module, optimizer)
    import deepspeed as ds

    from trainer.deepspeed_internals import disable_shared_memory_op

    disable_shared_memory_op()
    device = next(module.parameters()).device
    for name, value in (_ONE_PROCESS | {"LOCAL_RANK": str(device.index or 0)}).items():
        os.environ.setdefault(name, value)
    ds.init_distributed()
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = ds.initialize(model=module, optimizer=optimizer, config=settings)
    return Trained(module, engine, None)


@dataclass(frozen=True)
class Trained:
    """A network that is trained. forward: what is called; optimizer: None where that is DeepSpeed's
    engine, which steps by itself."""

    module: nn.Module
    forward: Any
    optimizer: torch.optim.Optimizer | None

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Of one part of a batch."""
        if self.optimizer is not None:
            loss.backward()
        else:
            self.forward.set_gradient_accumulation_boundary(is_last)
            self.forward.backward(loss)

    def step(self) -> float:
        """Change the weights; the gradient's norm."""
        if self.optimizer is None:
            self.forward.step()
            return float(self.forward.get_global_grad_norm())
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(norm)


def read_prompts(path: Path) -> list[Prompt]:
    return [prompt_of(row, place) for place, row in read_rows(path)]


def shuffled(
    prompts: Sequence[Prompt], size: int, num_batches: int, seed: int
) -> Iterator[list[Prompt]]:
    """Batches, epoch after epoch."""
    chance = random.Random(seed)
    left: list[Prompt] = []
    for _ in range(num_batches):
        while len(left) < size:
            left += chance.sample(prompts, len(prompts))
        yield left[:size]
        del left[:size]


def sampled(
    pool: RolloutPool, batches: Iterable[list[Prompt]], sampling: Sampling, ahead: int
) -> Iterator[list[RolloutGroup]]:
    """The rollouts of each batch, in order.

    ahead: so many further batches are sampled and scored while one is trained on, and so by weights
    that are as many steps older.
    """

    def of_step(step: int, prompts: list[Prompt]) -> list[RolloutGroup]:
        first = step * len(prompts)
        places = range(first, first + len(prompts))  # so that each step has its own seeds
        groups = sorted(pool.rollouts(prompts, sampling, places), key=lambda group: group.index)
        if not any(reward is not None for group in groups for reward in group.rewards):
            why = groups[0].error or (groups[0].scores and groups[0].scores.errors[0])
            raise ValueError(f"step {step}: no completion has a reward; the first error: {why}")
        return [group for group in groups if group.error is None]

    with ThreadPoolExecutor(1) as thread:
        coming: deque[Future[list[RolloutGroup]]] = deque()
        for step, prompts in enumerate(batches):
            coming.append(thread.submit(of_step, step, prompts))
            if len(coming) > ahead:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()


def rollouts(
    args: argparse.Namespace, pool: RolloutPool
) -> Iterator[tuple[list[RolloutGroup], Batch]]:
    """Those of each step, and the same as tensors."""
    sampling = Sampling(args.completions, max_tokens=args.max_tokens, seed=args.seed)
    prompts = shuffled(read_prompts(args.prompts), args.batch, args.steps, args.seed)
    pad_token_id = AutoTokenizer.from_pretrained(args.policy).pad_token_id or 0  # it is masked
    for groups in sampled(pool, prompts, sampling, args.ahead):
        yield groups, Batch.of(groups, pad_token_id).to(args.device)


def rewards_of(groups: Sequence[RolloutGroup]) -> Tensor:
    """(B,) of all completions, group after group; NaN where there is none."""
    rewards = [float("nan") if r is None else r for group in groups for r in group.rewards]
    return torch.tensor(rewards)


def rollout_options(description: str) -> argparse.ArgumentParser:
    """What is sampled, of which policy, and what scores it."""
    parser = argparse.ArgumentParser(description=description)
    add = parser.add_argument
    add("policy", help="directory of the policy")
    add("prompts", type=Path, help=".jsonl or .parquet rows with a prompt")
    add("out", type=Path, help="gets log.jsonl and the trained policy")
    add("--scorer", required=True, help="a service's URL, an application's name or a directory")
    add("--batch", type=int, default=8, help="prompts of a step")
    add("--completions", type=int, default=8, help="of a prompt")
    add("--max-tokens", type=int, default=48, help="of a completion")
    add("--max-model-len", type=int, default=256, help="tokens of a prompt and its completion")
    add("--num-actors", type=int, default=1, help="vLLM engines")
    add("--num-gpus", type=int, default=0, help="of an engine")
    add("--dtype", default="float32", help="of an engine's weights")
    add("--seed", type=int, default=0)
    return parser


def options(description: str) -> argparse.ArgumentParser:
    """Those of the trainers; an option's default is what the demo's policy learns by."""
    parser = rollout_options(description)
    add = parser.add_argument
    add("--steps", type=int, default=60)
    add("--learning-rate", type=float, default=1e-4)
    add("--clip", type=float, default=0.2, help="how far a token's ratio may go from 1")
    add("--kl", type=float, default=0.02, help="weight of the distance to the first policy")
    add("--part", type=int, default=64, help="completions that are computed at a time")
    add("--ahead", type=int, default=0, help="steps that are sampled while one is trained on")
    add("--device", default=_last_device(), help="where the policy is trained")
    add("--deepspeed", action="store_true", help="train with DeepSpeed ZeRO-2")
    return parser


def _last_device() -> str:
    """Ray gives the engines, and a scorer that is a directory, the first GPUs."""
    num_gpus = torch.cuda.device_count()
    return f"cuda:{num_gpus - 1}" if num_gpus else "cpu"


def pool_of(args: argparse.Namespace) -> RolloutPool:
    settings = VllmSettings(args.policy, args.num_gpus, args.max_model_len, dtype=args.dtype)
    return RolloutPool(settings, args.num_actors, args.scorer)


def with_pool(
    parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace, RolloutPool], None]
) -> None:
    """What the command line asks for."""
    args = parser.parse_args()
    with pool_of(args) as pool:
        run(args, pool)


class Log:
    """log.jsonl with a line for each step, and a line for people."""

    def __init__(self, out: Path) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self._file = (out / "log.jsonl").open("w")

    def step(self, step: int, groups: Sequence[RolloutGroup], **figures: float) -> None:
        """standard_error: of the mean reward, where there are two or more."""
        rewards = [r for group in groups for r in group.rewards if r is not None]
        lengths = [len(ids) for group in groups for ids in group.completion_ids]
        row = {"step": step, "reward": fmean(rewards), "tokens": fmean(lengths), **figures}
        if len(rewards) > 1:
            row["standard_error"] = stdev(rewards) / len(rewards) ** 0.5
        print(json.dumps(row), file=self._file, flush=True)
        shown = "  ".join(f"{name} {value:.3f}" for name, value in row.items() if name != "step")
        print(f"step {step}  {shown}", flush=True)
