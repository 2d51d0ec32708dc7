"""Attention over a forest of groups, each way by itself: forward, and forward with backward.

    python -m benchmarks.gpu.attention --output attention.json

`varlen` is what half precision takes on CUDA, `flex` what float32 takes, `path` one masked call a
segment, what is left where there is neither; on a CPU `cascade` and `path`. Medians of interleaved
rounds after a warm-up.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.arguments import positive
from benchmarks.common.report import aligned, asked, print_noise, too_noisy, write
from benchmarks.common.shapes import SHAPES
from benchmarks.common.workloads import Range, grpo
from reward_actor.engine.attention import (
    cascade_attention,
    flex_attention,
    path_attention,
    varlen_attention,
)
from reward_actor.engine.attention_plan import AttentionPlan
from reward_actor.engine.forest import plan_forests

Way = Callable[..., Tensor]


def ways(device: str, dtype: torch.dtype) -> dict[str, Way]:
    if device == "cpu":
        return {"cascade": cascade_attention, "path": path_attention}
    half: dict[str, Way] = {} if dtype == torch.float32 else {"varlen": varlen_attention}
    return {**half, "flex": flex_attention, "path": path_attention}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.attention")
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="8b")
    add("--groups", type=positive, default=8)
    add("--group-size", type=positive, default=8)
    add("--prompt-tokens", type=positive, default=1024)
    add("--completion-tokens", type=positive, default=512)
    add("--rounds", type=positive, default=5)
    add("--output", type=Path, help="for the figures as JSON; default: none")
    args = parser.parse_args(arguments)
    on_cuda = torch.cuda.is_available()
    device = torch.device("cuda" if on_cuda else "cpu")
    shape = SHAPES[args.shape]
    prompt, completion = (Range(n, n) for n in (args.prompt_tokens, args.completion_tokens))
    workload = grpo(shape, args.groups, args.group_size, prompt, completion)
    [forest] = plan_forests(workload.sequences, 2**31)
    plan = AttentionPlan(forest, device, kernel="flex")
    dtypes = (torch.bfloat16, torch.float32) if on_cuda else (torch.float32,)
    timed: dict[str, list[float]] = {}
    for dtype in dtypes:
        heads = [
            torch.randn(
                forest.num_rows, count, shape.head_dim, dtype=dtype, device=device
            ).requires_grad_()
            for count in (shape.num_attention_heads, *[shape.num_key_value_heads] * 2)
        ]
        for number in range(args.rounds + 1):
            for name, way in ways(device.type, dtype).items():
                for what, step in (("forward", _forward), ("and backward", _with_backward)):
                    seconds = _seconds(step, way, heads, plan)
                    if number:  # the first is a warm-up
                        key = f"{str(dtype).removeprefix('torch.')}, {name}, {what}"
                        timed.setdefault(key, []).append(seconds)
    medians = {name: statistics.median(values) * 1e3 for name, values in timed.items()}
    print(f"{forest.num_rows:,} rows, heads as in {args.shape}, on {device.type}")
    print(aligned([["way", "", "ms"], *([n, "", f"{ms:.2f}"] for n, ms in medians.items())]))
    noisy = too_noisy(timed)
    print_noise(noisy)
    if args.output:
        result = {**asked(arguments), "num_rows": forest.num_rows, "device": device.type}
        write({**result, "seconds": timed, "too_noisy": noisy}, args.output)
    return 0


def _forward(way: Way, heads: list[Tensor], plan: AttentionPlan) -> None:
    with torch.no_grad():
        way(*heads, plan)


def _with_backward(way: Way, heads: list[Tensor], plan: AttentionPlan) -> None:
    torch.autograd.grad(way(*heads, plan).float().square().sum(), heads)


def _seconds(step: Callable[..., None], *given: Any) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    step(*given)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


if __name__ == "__main__":
    sys.exit(main())
