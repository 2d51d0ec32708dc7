"""A reward model that keeps up with its policy: the loop of online RLHF.

    python examples/online_rm.py outputs/demo outputs/online

A policy that is trained long enough on a fixed reward model finds what the model likes and nobody
asked for: after `make demo`, "You might like lemonade and lemonade." So in each round the policy is
trained for some steps against the service (`grpo.py`); what it says now is sampled; a judge makes
pairs of that; the reward model is trained further on those; and the service takes the new version
while others ask it.

The judge is the rule of `preferences.py`, in place of people or of a larger model. So what the
policy says can be graded, besides what the reward model makes of it.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import grpo
import ray
from policy_gradient import pool_of, read_prompts
from preferences import grade_completion, make_prompts

from reward_actor import Group, RewardClient
from reward_actor.files import read_rows
from reward_actor.groups import Prompt
from reward_actor.rollout import RolloutGroup, Sampling
from serve.app import start
from serve.config import ServeConfig

Row = dict[str, Any]
PROMPTS = {prompt.text: prompt for prompt in make_prompts(0)}


def run(args: argparse.Namespace) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    if any(args.out.iterdir()):
        raise SystemExit(f"{args.out} is not empty; name another directory, or remove it")
    models = RewardModels(args.demo, args.out, args.port, args.seed)
    trained_on = args.demo / "data" / "train.jsonl"
    unseen = args.unseen or args.demo / "data" / "heldout.jsonl"
    learning = grpo.parser().parse_args(
        [str(args.demo / "policy"), str(trained_on), str(args.out), "--scorer", models.url]
    )
    learning.steps, learning.learning_rate = args.steps, args.learning_rate
    chance = random.Random(args.seed)
    log = (args.out / "rounds.jsonl").open("w")
    with pool_of(learning) as pool:
        for number in range(1, args.rounds + 1):
            learning.out = args.out / f"policy{number}"
            learning.seed = 1000 * args.seed + number
            grpo.train(learning, pool)
            learning.policy = str(learning.out)
            sampling = Sampling(8, max_tokens=learning.max_tokens, seed=learning.seed)
            said, said_unseen = (
                judged(pool.rollouts(chosen(path, args.prompts, chance), sampling))
                for path in (trained_on, unseen)
            )
            row = {
                "round": number,
                "grade": over_prompts(one.grades for one in said_unseen),
                "reward": over_prompts(one.rewards for one in said_unseen),
            }
            if not args.fixed:
                row |= models.renew(number, said, said_unseen)
            print(json.dumps(row), file=log, flush=True)
            print(row, flush=True)
    models.close()


class RewardModels:
    """The reward model in its versions, and the service that holds the newest."""

    def __init__(self, demo: Path, out: Path, port: int, seed: int) -> None:
        self._out, self._seed = out, seed
        self._registry = out / "reward-models"
        first = self._registry / "round0"
        shutil.copytree(demo / "reward-model" / "export", first)
        settings = {"model": str(first), "registry": str(self._registry), "device": "cpu"}
        self.url = start(ServeConfig.model_validate(settings), port=port)
        self._client = RewardClient(self.url)
        self._old_pairs = [row for _, row in read_rows(demo / "data" / "train.jsonl")]
        self._new_pairs: list[Row] = []
        self._chance = random.Random(seed)

    def close(self) -> None:
        self._client.close()
        ray.shutdown()

    def renew(
        self, number: int, said: Sequence[Judged], said_unseen: Sequence[Judged]
    ) -> dict[str, Any]:
        """Train further on what was said, and serve that.

        said_unseen: to prompts that no version is trained on, to see by what the old version and
        the new one are worth.
        """
        fresh = pairs_of(said, self._chance)
        self._new_pairs += fresh
        heldout = self._write(f"heldout{number}.jsonl", pairs_of(said_unseen, self._chance))
        accuracy = evaluate(self.url, heldout)

        # With as many of the first pairs, so that nothing is forgotten.
        num_old = min(len(self._new_pairs), len(self._old_pairs))
        mixed = self._new_pairs + self._chance.sample(self._old_pairs, num_old)
        further = self._out / f"reward-model{number}"
        command = ["train", "--config", "quickstart", "--output-dir", further]
        command += ["--model.path", self._registry / f"round{number - 1}"]
        command += ["--data.train", self._write(f"pairs{number}.jsonl", mixed)]
        command += ["--optimizer.learning-rate", "1e-3", "--training.num-epochs", "2"]
        rayward(*command, "--training.seed", self._seed)
        shutil.copytree(further / "export", self._registry / f"round{number}")

        with asked_meanwhile(self._client, said) as answered:
            self._client.swap(f"round{number}")
        again = self._client.score_groups([Group(o.prompt, o.completions) for o in said_unseen])
        return {
            "num_pairs": len(fresh),
            "accuracy": accuracy,
            "accuracy_of_the_next": evaluate(self.url, heldout),
            "reward_by_the_next": over_prompts(one.rewards for one in again),
            "num_answers_during_the_swap": list(answered.values()),
        }

    def _write(self, name: str, rows: Sequence[Row]) -> Path:
        path = self._out / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path


@dataclass(frozen=True)
class Judged:
    """Completions of a prompt, with their rewards and what the judge says of them."""

    prompt: str
    completions: list[str]
    rewards: list[float | None]
    grades: list[int]


def judged(groups: Iterable[RolloutGroup]) -> list[Judged]:
    found = []
    for group in sorted(groups, key=lambda group: group.index):
        prompt = PROMPTS[str(group.prompt)]
        grades = [grade_completion(prompt, completion) for completion in group.completions]
        found.append(Judged(prompt.text, group.completions, group.rewards, grades))
    return found


def pairs_of(said: Sequence[Judged], chance: random.Random) -> list[Row]:
    """Of each prompt at most eight, of different grades."""
    rows = []
    for one in said:
        graded = set(zip(one.grades, one.completions, strict=True))
        pairs = [
            sorted(pair) for pair in combinations(sorted(graded), 2) if pair[0][0] < pair[1][0]
        ]
        for (_, rejected), (_, chosen) in chance.sample(pairs, min(8, len(pairs))):
            rows.append({"prompt": one.prompt, "chosen": chosen, "rejected": rejected})
    return rows


def evaluate(url: str, pairs: Path) -> dict[str, float]:
    """The accuracy on pairs, with its 95 % interval."""
    figures = json.loads(rayward("eval", url, pairs, "--json"))
    ends = {"mean": "accuracy", "low": "accuracy_low", "high": "accuracy_high"}
    return {end: float(figures[name]) for end, name in ends.items()}


def rayward(*arguments: object) -> str:
    command = [sys.executable, "-m", "rayward", *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


@contextmanager
def asked_meanwhile(client: RewardClient, said: Sequence[Judged]) -> Iterator[dict[str, int]]:
    """Asks for rewards without a pause; gets the number of answers by each version. Raises what a
    request does that fails."""
    answered: dict[str, int] = {}
    done = threading.Event()

    def ask() -> None:
        while not done.is_set():
            for one in said:
                [scores] = client.score_groups([Group(one.prompt, one.completions)])
                answered[scores.model_version] = answered.get(scores.model_version, 0) + 1

    with ThreadPoolExecutor(1) as thread:
        asking = thread.submit(ask)
        try:
            yield answered
        finally:
            done.set()
        asking.result()


def chosen(path: Path, most: int, chance: random.Random) -> list[Prompt]:
    prompts = read_prompts(path)
    return chance.sample(prompts, min(most, len(prompts)))


def over_prompts(values: Iterable[Sequence[float | None]]) -> dict[str, float]:
    """The mean of all prompts' means, with its standard error."""
    means = [fmean(value for value in each if value is not None) for each in values]
    return {"mean": fmean(means), "standard_error": stdev(means) / len(means) ** 0.5}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("demo", type=Path, help="what `make demo` has made")
    add("out", type=Path, help="gets the models of every round, and rounds.jsonl")
    add("--rounds", type=int, default=3)
    add("--steps", type=int, default=25, help="of the policy, in a round")
    add("--learning-rate", type=float, default=2e-4, help="of the policy")
    add("--prompts", type=int, default=128, help="that are sampled for pairs, in a round")
    add("--unseen", type=Path, help="rows with prompts to judge by; default the held-out ones")
    add("--fixed", action="store_true", help="leave the reward model as it is, to compare")
    add("--port", type=int, default=8000, help="of the service")
    add("--seed", type=int, default=0)
    run(parser.parse_args())


if __name__ == "__main__":
    main()
