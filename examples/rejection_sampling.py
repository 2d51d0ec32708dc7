"""Best-of-N, and a policy that is trained on it (rejection sampling, as Open Instruct does it).

    python examples/rejection_sampling.py outputs/demo/policy outputs/demo/data/train.jsonl \\
        outputs/rejection --scorer outputs/demo/reward-model/export

Each round samples N completions of some prompts and trains the policy on the best of each, by plain
next-token training. OUT gets best1.jsonl, best2.jsonl, ... ({"prompt", "completion", "reward"}),
pairs1.jsonl, ... (best and worst, to train by preferences), the last policy, and log.jsonl with the
mean reward of the best of 1, 2, 4, ... N.

Without the training, `rayward rollout --best-of` and `--pairs` write the same rows.

Stiennon et al. 2020, arXiv 2009.01325 (best-of-N); Touvron et al. 2023, arXiv 2307.09288, 3.2.3.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable, Sequence
from math import comb
from pathlib import Path
from statistics import fmean

import torch
from policy_gradient import read_prompts, rollout_options, with_pool
from train_policy import train_policy

from reward_actor.files import Row
from reward_actor.rollout import RolloutPool, Sampling
from reward_actor.rollout.rows import best_against_worst, best_of, rollout_row


def run(args: argparse.Namespace, pool: RolloutPool) -> None:
    torch.set_num_threads(1)  # as train_policy.py says
    args.out.mkdir(parents=True, exist_ok=True)
    prompts = read_prompts(args.prompts)
    chance = random.Random(args.seed)
    policy = Path(args.policy)
    log = (args.out / "log.jsonl").open("w")
    for number in range(args.rounds + 1):
        sampling = Sampling(args.completions, max_tokens=args.max_tokens, seed=args.seed + number)
        asked = chance.sample(prompts, min(args.batch, len(prompts)))
        groups = sorted(pool.rollouts(asked, sampling), key=lambda group: group.index)
        rows = [rollout_row(group, {}) for group in groups]
        rewards = [[r for r in row.get("rewards", ()) if r is not None] for row in rows]
        best_of_each = best_of_n(rewards, args.completions)
        row = {"round": number, "reward_of_the_best_of": best_of_each}
        print(json.dumps(row), file=log, flush=True)
        print(f"round {number}: reward of the best of", shown(best_of_each), flush=True)
        if number == args.rounds:
            break
        best = args.out / f"best{number + 1}.jsonl"
        write(best, (kept for row in rows for kept in best_of(row)))
        pairs = args.out / f"pairs{number + 1}.jsonl"
        write(pairs, (kept for row in rows for kept in best_against_worst(row)))
        train_policy(
            policy, best, args.out / f"policy{number + 1}", num_steps=args.steps,
            learning_rate=args.learning_rate, seed=args.seed + number,
        )  # fmt: skip
        policy = args.out / f"policy{number + 1}"
        pool.update_weights(policy)


def best_of_n(rewards: Iterable[Sequence[float]], most: int) -> dict[int, float]:
    """What the best of 1, 2, 4, ... `most` completions has on average, over the prompts that have
    so many rewards: of M sorted rewards the i-th (from 0) is the best of C(i, N - 1) of all C(M, N)
    choices."""
    known = [sorted(each) for each in rewards if len(each) >= most]
    if not known:
        raise ValueError(f"no prompt has rewards of all its {most} completions")
    sizes = [2**power for power in range(most.bit_length())]
    return {
        n: fmean(
            sum(comb(i, n - 1) * reward for i, reward in enumerate(each)) / comb(len(each), n)
            for each in known
        )
        for n in sizes
    }


def shown(figures: dict[int, float]) -> str:
    return "  ".join(f"{n}: {reward:+.3f}" for n, reward in figures.items())


def write(path: Path, rows: Iterable[Row]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def parser() -> argparse.ArgumentParser:
    made = rollout_options((__doc__ or "").partition("\n")[0])
    add = made.add_argument
    add("--rounds", type=int, default=3)
    add("--steps", type=int, default=30, help="of training, in a round")
    add("--learning-rate", type=float, default=5e-4)
    made.set_defaults(batch=128, completions=16)
    return made


if __name__ == "__main__":
    with_pool(parser(), run)
