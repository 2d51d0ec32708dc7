"""TRL's GRPOTrainer, rewarded by a running service.

    rayward serve outputs/demo/reward-model/export --port 8000 &
    python examples/trl_grpo.py outputs/demo/policy outputs/demo/data/train.jsonl outputs/trl \\
        --scorer http://127.0.0.1:8000

OUT gets log.jsonl, with the mean reward of each step, and the trained policy.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import set_seed
from trl import GRPOConfig, GRPOTrainer

from reward_actor.conversation import as_messages
from reward_actor.files import prompt_of, read_rows
from reward_actor.integrations.trl import reward_function


def train(args: argparse.Namespace) -> None:
    set_seed(args.seed)
    prompts = [as_messages(prompt_of(row, place)) for place, row in read_rows(args.prompts)]
    config = GRPOConfig(
        output_dir=str(args.out),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch * args.completions,
        num_generations=args.completions,
        max_completion_length=args.max_tokens,
        learning_rate=args.learning_rate,
        lr_scheduler_type="constant",
        beta=args.kl,
        temperature=1.0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        seed=args.seed,
    )
    rewards: Any = reward_function(args.scorer, asynchronous=args.asynchronous)
    trainer = GRPOTrainer(
        model=str(args.policy),
        reward_funcs=rewards,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
    )
    trainer.train()
    trainer.save_model(str(args.out))
    with (args.out / "log.jsonl").open("w") as log:
        for row in trainer.state.log_history:
            if "reward" in row:
                figures = {"step": row["step"], "reward": row["reward"], "kl": row.get("kl")}
                print(json.dumps(figures), file=log)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = made.add_argument
    add("policy", help="directory of the policy")
    add("prompts", type=Path, help=".jsonl or .parquet rows with a prompt")
    add("out", type=Path, help="gets log.jsonl and the trained policy")
    add("--scorer", required=True, help="URL of a service")
    add("--asynchronous", action="store_true", help="ask it beside TRL's other reward functions")
    add("--steps", type=int, default=60)
    add("--batch", type=int, default=8, help="prompts of a step")
    add("--completions", type=int, default=8, help="of a prompt")
    add("--max-tokens", type=int, default=48, help="of a completion")
    add("--learning-rate", type=float, default=1e-4)
    add("--kl", type=float, default=0.02, help="weight of the distance to the first policy")
    add("--seed", type=int, default=0)
    return made


if __name__ == "__main__":
    train(parser().parse_args())
