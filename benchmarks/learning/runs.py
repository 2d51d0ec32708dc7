"""The trainers of examples/ as subprocesses, and what becomes of the policies that they train."""

from __future__ import annotations

import importlib
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks.common.channel import ChildError
from benchmarks.common.processes import Server, free_port

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

TRAINERS: dict[str, tuple[str, ...]] = {
    "GRPO": ("grpo.py",),
    "GRPO, one step ahead": ("grpo.py", "--ahead", "1"),
    "PPO": ("ppo.py", "--critic", "EXPORT"),
    "TRL": ("trl_grpo.py",),
    "TRL, asynchronous": ("trl_grpo.py", "--asynchronous"),
}
"""Each with its script and the options that it needs beside its defaults."""

_ENDS = 10
_START_TIMEOUT_S = 180.0
_SAMPLING_SEED = 100

Row = dict[str, Any]


def train(name: str, demo: Path, out: Path, url: str, seed: int, *more: str) -> list[Row]:
    """The lines of the log of one training, `step` and `reward` in each. Raises ChildError."""
    script, *options = TRAINERS[name]
    export = str(demo / "reward-model" / "export")
    scorer = url if script == "trl_grpo.py" else export
    options = [export if option == "EXPORT" else option for option in options]
    policy, prompts = demo / "policy", demo / "data" / "train.jsonl"
    run(script, policy, prompts, out, "--scorer", scorer, "--seed", seed, *options, *more)
    return log_of(out / "log.jsonl")


def run(script: str, *arguments: object) -> None:
    """Raises ChildError with the end of what it said."""
    command = [sys.executable, str(EXAMPLES / script), *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise ChildError(f"{script} ended with {done.returncode}: {done.stdout[-2000:]}")


def log_of(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@contextmanager
def service(demo: Path, log: Path) -> Iterator[str]:
    """The URL of a service of the demo's reward model."""
    port = free_port()
    export = str(demo / "reward-model" / "export")
    command = [sys.executable, "-m", "rayward", "serve", export, "--port", str(port)]
    with Server("the service", [*command, "--device", "cpu"], {}, log) as server:
        server.wait_until_ready(port, "/ready", _START_TIMEOUT_S)
        yield f"http://127.0.0.1:{port}"


def rise(rewards: Sequence[float]) -> dict[str, float]:
    """The means of the first and of the last ten steps, and their difference in standard errors,
    which are those of a mean of ten steps."""
    first, last = rewards[:_ENDS], rewards[-_ENDS:]
    variance = statistics.variance(first) / len(first) + statistics.variance(last) / len(last)
    difference = statistics.fmean(last) - statistics.fmean(first)
    return {
        "first": statistics.fmean(first),
        "last": statistics.fmean(last),
        "standard_errors": difference / variance**0.5,
    }


def judge(policies: Sequence[Path], demo: Path, num_completions: int = 4) -> list[Row]:
    """What each policy says to the demo's held-out prompts, which nothing was trained on: the mean
    reward, and the mean grade by the rule that the preferences follow, each with its standard
    error over prompts."""
    import ray

    from reward_actor.rollout import RolloutPool, Sampling, VllmSettings

    preferences = _preferences()
    asked = {prompt.text: prompt for prompt in preferences.make_prompts(0)}
    prompts = [row["prompt"] for row in log_of(demo / "data" / "heldout.jsonl")]
    sampling = Sampling(num_completions, max_tokens=48, seed=_SAMPLING_SEED)
    settings = VllmSettings(str(policies[0]), max_model_len=256, dtype="float32")
    found = []
    with RolloutPool(settings, scorer=str(demo / "reward-model" / "export")) as pool:
        for policy in policies:
            pool.update_weights(policy)
            groups = list(pool.rollouts(prompts, sampling))
            rewards = [statistics.fmean(r for r in g.rewards if r is not None) for g in groups]
            grades = [
                statistics.fmean(
                    preferences.grade_completion(asked[str(g.prompt)], c) for c in g.completions
                )
                for g in groups
            ]
            found.append({"reward": _mean(rewards), "grade": _mean(grades)})
    ray.shutdown()
    return found


def write_fresh_prompts(demo: Path, path: Path) -> None:
    """Those that are in no file of the demo: nothing was trained, judged or chosen by them."""
    files = (demo / "data").glob("*.jsonl")
    known = {row["prompt"] for file in files for row in log_of(file)}
    fresh = [prompt.text for prompt in _preferences().make_prompts(0) if prompt.text not in known]
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in fresh))


def _preferences() -> ModuleType:
    sys.path.insert(0, str(EXAMPLES))
    return importlib.import_module("preferences")


def _mean(of_prompts: Sequence[float]) -> dict[str, float]:
    error = statistics.stdev(of_prompts) / len(of_prompts) ** 0.5
    return {"mean": statistics.fmean(of_prompts), "standard_error": error}
