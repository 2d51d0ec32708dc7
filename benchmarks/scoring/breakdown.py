"""Where a scoring run spends its time.

    python -m benchmarks.scoring.breakdown --workload grpo --output breakdown.json

One run of a workload through the engine under torch.profiler, after a warm-up; operators are summed
by kind, by the time that they take themselves. Kinds: matrix products of the layers; attention, its
joins included; what happens to each token between the products; everything else, Python included.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import machine
from benchmarks.common.shapes import SHAPES, build_network
from benchmarks.scoring.__main__ import make_parser, make_workload
from reward_actor.engine.engine import Engine
from reward_actor.model.reward_model import RewardModel

# By the beginning of an operator's name.
_KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear", "mkldnn::"),
    "attention": (
        "aten::_scaled_dot_product",
        "aten::_flash_attention",
        "torch_attn::",
        "_C::cpu_att",
        "aten::logaddexp",
        "aten::addcmul",
    ),
    "between the products": (
        "aten::silu", "aten::mul", "aten::add", "aten::pow", "aten::mean", "aten::rsqrt",
        "aten::cat", "aten::neg", "aten::copy_", "aten::sub", "aten::exp", "aten::index",
        "_C::rms_norm", "_C::rotary",
    ),
}  # fmt: skip


def main() -> int:
    parser = make_parser()
    parser.description = "Where a scoring run spends its time."
    args: argparse.Namespace = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = (args.workload or ["grpo"])[0]
    native = device == "cuda" or machine.has_native_bfloat16()
    dtype = ("bfloat16" if native else "float32") if args.dtype == "auto" else args.dtype
    shape = SHAPES[args.shape]
    torch.set_num_threads(args.threads or machine.available_threads())
    workload = make_workload(name, shape, args)
    network = build_network(shape, getattr(torch, dtype), device)
    engine = Engine(RewardModel(network))
    engine.freeze()
    engine.raw_scores(workload.sequences[: len(workload.sequences) // 4])
    began = time.perf_counter()
    activities = [ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiled:
        engine.raw_scores(workload.sequences)
    seconds = time.perf_counter() - began
    spent = dict.fromkeys(_KINDS, 0.0)
    operators = {}
    for event in profiled.key_averages():
        own = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
        operators[event.key] = own / 1e6
        for kind, names in _KINDS.items():
            if event.key.startswith(names):
                spent[kind] += own / 1e6
                break
    spent["everything else"] = seconds - sum(spent.values())
    print(f"{name}, {args.shape}, {dtype} on {device}: {seconds:.2f} s, path {engine.path!r}\n")
    print("| kind | s | share |\n|---|---|---|")
    for kind, own in spent.items():
        print(f"| {kind} | {own:.2f} | {own / seconds:.1%} |")
    largest = dict(sorted(operators.items(), key=lambda item: -item[1])[:12])
    print("\nlargest operators: " + ", ".join(f"{k} {v:.2f}" for k, v in largest.items()))
    if args.output:
        report = {
            "machine": machine.describe_cpu(),
            "versions": machine.versions(),
            "workload": name,
            "shape": args.shape,
            "dtype": dtype,
            "path": engine.path,
            "seconds": seconds,
            "kinds": spent,
            "operators": largest,
        }
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        Path(args.output).write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
