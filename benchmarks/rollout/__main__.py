"""How rollouts come out of a pool: overlapped with scoring, over Ray or HTTP, from more actors,
after new weights.

    python -m benchmarks.rollout --workload all --rounds 5

Policies and reward models have random weights. README.md says how to read it.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
from pathlib import Path

from benchmarks.common import machine
from benchmarks.common.arguments import positive
from benchmarks.common.channel import ChildError
from benchmarks.common.processes import end_on_sigterm
from benchmarks.common.report import RESULTS, asked, print_noise, write
from benchmarks.rollout import report
from benchmarks.serving.report import summarize

NAMES = ("overlap", "overlap-simulated", "transport", "actors", "weights")
SHAPES = ("tiny", "5m")
_OF_VLLM = ("overlap", "weights")


def main(arguments: list[str] | None = None) -> int:
    """Run, print, write the JSON. 1 when something failed or rewards differ, 2 for bad flags."""
    parser = make_parser()
    args = parser.parse_args(arguments)
    wanted = args.workload or ["all"]
    wanted = [name for name in NAMES if name in wanted or "all" in wanted]
    skipped = {}
    if importlib.util.find_spec("vllm") is None:
        skipped = {name: "vllm is not installed" for name in wanted if name in _OF_VLLM}
        wanted = [name for name in wanted if name not in skipped]
    for name, why in skipped.items():
        print(f"skipped: {name}: {why}")
    if not wanted:
        parser.error("nothing is left to run")
    end_on_sigterm()
    from serve.haproxy import settings

    settings.enable()  # before Ray Serve is imported
    from benchmarks.rollout.workloads import SCALES, WORKLOADS, Runs

    runs: Runs = {}
    failed = {}
    for name in wanted:
        with tempfile.TemporaryDirectory() as scratch:
            try:
                runs |= WORKLOADS[name](SCALES[args.shape], Path(scratch), args.rounds)
            except (ChildError, ValueError) as error:
                print(f"failed: {name}: {error}", file=sys.stderr)
                failed[name] = str(error)
    figures = summarize(runs)
    result = {
        **asked(arguments),
        "machine": machine.describe_cpu(),
        "versions": machine.versions(),
        "shape": args.shape,
        "scale": vars(SCALES[args.shape]),
        "rounds": args.rounds,
        "skipped": skipped,
        "failed": failed,
        "measurements": figures,
        "targets": report.targets(figures),
        "too_noisy": report.noisy(figures),
    }
    print(f"\n{result['machine']['cpu']}, float32, {args.shape}\n")
    print(report.tables(figures, result["targets"]))
    print_noise(result["too_noisy"])
    write(result, args.output or RESULTS / f"rollout-{args.shape}-cpu-float32.json")
    return int(bool(failed))


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.rollout", description=(__doc__ or "").partition("\n\n")[0]
    )
    add = parser.add_argument
    choices = (*NAMES, "all")
    add("--workload", action="append", choices=choices, help="repeatable; default all")
    add("--shape", choices=SHAPES, default="5m", help="size of the networks and of the workloads")
    add("--rounds", type=positive, default=5)
    output = "default: benchmarks/results/rollout-SHAPE-cpu-float32.json"
    add("--output", type=Path, help=output)
    return parser


if __name__ == "__main__":
    sys.exit(main())
