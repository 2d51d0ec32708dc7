"""All that a GPU is measured by, within eight minutes, the most important first.

    python -m benchmarks.gpu                    # on a GPU; needs torch and transformers only
    python -m benchmarks.gpu --dry-run          # without one; see `dry_run`

Every part is a command of its own with a time limit, and what it found is printed and written as
soon as it ends: a run that is cut short says what it had. What a part needs and does not find
(pytest, vLLM, SGLang) is said and left out.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common.arguments import seconds
from benchmarks.common.processes import end_on_sigterm
from benchmarks.common.report import RESULTS, asked, write

_ROOT = Path(__file__).resolve().parents[2]
_LIMIT_S = 480.0


@dataclass(frozen=True)
class Part:
    """A command. limit_s: what it may take, if so much is left. writes: whether it takes
    `--output`, for its figures as JSON. needs: what must be installed for it."""

    name: str
    arguments: tuple[str, ...]
    limit_s: float
    writes: bool = True
    needs: str | None = None


def _scoring(shape: str, scale: int, limit_s: float, peers: str, *more: str) -> Part:
    return Part(
        " ".join(["scoring,", shape, *more[1:], f"({peers})"]),
        (
            *("-m", "benchmarks.scoring", "--shape", shape, "--scale", str(scale)),
            *("--workload", "grpo", "--workload", "unique", "--rounds", "3"),
            *("--peers", peers, *more),
        ),
        limit_s,
        needs=next((engine for engine in ("vllm", "sglang") if engine in peers), None),
    )


def _training(shape: str, limit_s: float, *more: str) -> Part:
    return Part(
        f"training, {shape}{' with LoRA' if more else ''}",
        (
            *("-m", "benchmarks.training", "--engine", "torch", "--shape", shape),
            *("--pairs", "64", "--rounds", "3", *more),
        ),
        limit_s,
    )


_PEERS = "ours,padded_sorted,flash"
# Together they have the whole time; what one leaves is the next one's.
PARTS = (
    _scoring("0.6b", 8, 90, _PEERS),
    Part(
        "tests",
        (
            *("-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", "-m", "cuda"),
            "tests/system/test_cuda.py",
        ),
        70,
        writes=False,
        needs="pytest",
    ),
    _scoring("8b", 2, 80, _PEERS),
    _training("1b", 50),
    _training("8b", 70, "--lora", "16"),
    Part("attention, 8b", ("-m", "benchmarks.gpu.attention"), 30),
    _scoring("0.6b", 2, 30, "ours,padded_sorted", "--dtype", "float32"),
    *(_scoring("0.6b", 8, 20, f"ours,{engine}") for engine in ("vllm", "sglang")),
    *(_scoring("8b", 2, 10, f"ours,{engine}") for engine in ("vllm", "sglang")),
)


def main(arguments: list[str] | None = None) -> int:
    """1 when a part failed, 2 for bad flags; a part that was cut short has not failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--dry-run", action="store_true", help="on tensors without memory")
    parser.add_argument("--limit-s", type=seconds, default=_LIMIT_S, help="for all parts together")
    parser.add_argument(
        "--output", type=Path, help="default: benchmarks/results/gpu[-dry-run].json"
    )
    args = parser.parse_args(arguments)
    name = "gpu-dry-run.json" if args.dry_run else "gpu.json"
    output = args.output or RESULTS / name
    if args.dry_run:
        return _dry_run(arguments, output)
    import torch

    if not torch.cuda.is_available():
        parser.error("there is no GPU here; --dry-run needs none")
    end_on_sigterm()
    result = {**asked(arguments), "gpu": torch.cuda.get_device_name(), "parts": {}}
    deadline = time.monotonic() + args.limit_s
    spare = 0.0
    for part in PARTS:
        limit_s = min(part.limit_s + spare, deadline - time.monotonic())
        result["parts"][part.name] = found = _run(part, limit_s)
        spare = max(0.0, limit_s - found.get("seconds", 0.0))
        write(result, output)
    print("\n".join(f"{name}: {part['outcome']}" for name, part in result["parts"].items()))
    return int(any(part["outcome"] == "failed" for part in result["parts"].values()))


def _run(part: Part, limit_s: float) -> dict[str, Any]:
    """Its outcome (passed, failed, cut short, left out) with its seconds and figures."""
    print(f"\n== {part.name}", flush=True)
    if part.needs is not None and importlib.util.find_spec(part.needs) is None:
        return {"outcome": f"left out: {part.needs} is not installed"}
    if limit_s <= 0:
        return {"outcome": "left out: no time left"}
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        figures = Path(scratch) / "figures.json"
        more = ("--output", str(figures)) if part.writes else ()
        command = [sys.executable, *part.arguments, *more]
        process = subprocess.Popen(command, cwd=_ROOT, start_new_session=True)
        try:
            outcome = "passed" if process.wait(limit_s) == 0 else "failed"
        except subprocess.TimeoutExpired:
            outcome = "cut short"
        finally:  # whatever ends this, with the peers that it has started
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        found = {"outcome": outcome, "seconds": time.monotonic() - began}
        if figures.exists():
            found["figures"] = json.loads(figures.read_text())
        return found


def _dry_run(arguments: list[str] | None, output: Path) -> int:
    import torch

    from benchmarks.gpu.dry_run import dry_run, faults, tables

    if not torch.backends.cuda.is_built():
        print("this torch is built without CUDA; `make check-cuda` installs one", file=sys.stderr)
        return 2
    results = dry_run()
    print(tables(results))
    write({**asked(arguments), "torch": torch.__version__, "shapes": results}, output)
    return int(any(faults(result) for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
