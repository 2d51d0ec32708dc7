"""Whether a policy gets better by our rewards: GRPO, PPO and TRL's trainer, best-of-N, and a reward
model that is trained further.

    python -m benchmarks.learning --demo outputs/demo --seeds 3

After `make demo`, with whose policy, reward model and prompts it begins. README.md says how to read
it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import machine
from benchmarks.common.arguments import positive
from benchmarks.common.channel import ChildError
from benchmarks.common.processes import end_on_sigterm, free_port
from benchmarks.common.report import RESULTS, asked, write
from benchmarks.learning import pictures, report, runs

PARTS = ("curves", "best-of", "loop")


def main(arguments: list[str] | None = None) -> int:
    """Run, print, write the JSON and the pictures. 1 when something failed, 2 for bad flags."""
    parser = make_parser()
    args = parser.parse_args(arguments)
    if not (args.demo / "summary.json").is_file():
        parser.error(f"{args.demo} is not the output of `make demo`")
    end_on_sigterm()
    result: dict[str, Any] = json.loads(args.output.read_text()) if args.output.exists() else {}
    result |= {
        **asked(arguments),
        "machine": machine.describe_cpu(),
        "versions": machine.versions(),
        "seeds": args.seeds,
    }
    failed = False
    for part in args.part or PARTS:
        with tempfile.TemporaryDirectory() as scratch:
            try:
                result[part] = MEASURE[part](args.demo, Path(scratch), args.seeds)
            except ChildError as error:
                print(f"failed: {part}: {error}", file=sys.stderr)
                failed = True
    print(report.tables(result))
    write(result, args.output)
    pictures.draw(result, args.pictures)
    return int(failed)


def curves(demo: Path, scratch: Path, num_seeds: int) -> dict[str, Any]:
    """By trainer: of each seed the rewards by step, their rise, and what the policy is worth."""
    found: dict[str, Any] = {name: [] for name in runs.TRAINERS}
    policies = [demo / "policy"]
    with runs.service(demo, scratch / "service.log") as url:
        for seed in range(num_seeds):
            for name in runs.TRAINERS:
                out = scratch / f"{name}-{seed}"
                log = runs.train(name, demo, out, url, seed)
                rewards = [row["reward"] for row in log]
                found[name].append({"seed": seed, "rewards": rewards, **runs.rise(rewards)})
                policies.append(out)
                print(f"{name}, seed {seed}: {runs.rise(rewards)}", flush=True)
    first, *others = runs.judge(policies, demo)
    trained = iter(others)
    for seed in range(num_seeds):
        for name in runs.TRAINERS:
            found[name][seed] |= {"heldout": next(trained)}
    return {"before": first, "trainers": found}


def best_of(demo: Path, scratch: Path, num_seeds: int) -> dict[str, Any]:
    """Rounds of rejection sampling: the reward of the best of N by round."""
    export = demo / "reward-model" / "export"
    given = (demo / "policy", demo / "data" / "train.jsonl")
    runs.run("rejection_sampling.py", *given, scratch, "--scorer", export)
    rows = runs.log_of(scratch / "log.jsonl")
    policies = sorted(scratch.glob("policy*"))
    return {"rounds": rows, "heldout": runs.judge([demo / "policy", *policies], demo)}


def loop(demo: Path, scratch: Path, num_seeds: int) -> dict[str, Any]:
    """The same trainings against a reward model that stays, and against one that is renewed: the
    rounds of each seed. Judged by prompts that had no part in choosing the settings."""
    fresh = scratch / "fresh.jsonl"
    runs.write_fresh_prompts(demo, fresh)
    found: dict[str, Any] = {"fixed": [], "renewed": []}
    for seed in range(num_seeds):
        for name, rounds in found.items():
            out = scratch / f"{name}-{seed}"
            options = ["--fixed"] if name == "fixed" else []
            given = ("--port", free_port(), "--rounds", 4, "--seed", seed, "--unseen", fresh)
            started = time.monotonic()
            runs.run("online_rm.py", demo, out, *given, *options)
            rounds.append(runs.log_of(out / "rounds.jsonl"))
            print(f"{name}, seed {seed}, {time.monotonic() - started:.0f} s", flush=True)
            print(json.dumps(rounds[-1]), flush=True)
    return found


MEASURE = {"curves": curves, "best-of": best_of, "loop": loop}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.learning", description=(__doc__ or "").partition("\n\n")[0]
    )
    add = parser.add_argument
    add("--demo", type=Path, default=Path("outputs/demo"), help="what `make demo` has made")
    add("--part", action="append", choices=PARTS, help="repeatable; default all")
    add("--seeds", type=positive, default=3, help="of every trainer")
    output = RESULTS / "learning-cpu-float32.json"
    add("--output", type=Path, default=output, help="parts that are not measured stay as they are")
    add("--pictures", type=Path, default=Path("docs/images"), help="directory")
    return parser


if __name__ == "__main__":
    sys.exit(main())
