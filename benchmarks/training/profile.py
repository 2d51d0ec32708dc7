"""Where a training step spends its time: operators summed by kind, by what they take themselves."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from torch.profiler import ProfilerActivity, profile

from benchmarks.training.peers import OPTIMIZER

if TYPE_CHECKING:
    import torch

_ATTENTION = (
    "_Cascade",
    "aten::scaled_dot_product_attention",
    "aten::_scaled_dot_product",
    "ScaledDotProduct",
    "torch_attn::",
)
_COMMUNICATION = ("c10d::", "gloo:", "nccl:", "record_param_comms")
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear", "aten::matmul")
KINDS = (
    "matrix products",
    "attention",
    "elementwise",
    "optimizer",
    "communication",
    "everything else",
)


def profile_step(step: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    """seconds, kinds (seconds of each of KINDS) and the largest operators of one step.

    attention: with all that its own functions call; optimizer: the clipping and the update, what
    they call included; elementwise: every other operator of torch (norms, activations, rotary
    positions, copies, DeepSpeed's of gradients too); everything else: Python, idling, the profiler.
    """
    on_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    with profile(activities=activities) as profiled:
        start = time.perf_counter()
        step()
        seconds = time.perf_counter() - start
    kinds = dict.fromkeys(KINDS, 0.0)
    operators: dict[str, float] = defaultdict(float)
    for event in profiled.events():
        if event.device_type.name != "CPU":  # a kernel: counted where it was called
            continue
        own = (event.self_device_time_total if on_cuda else event.self_cpu_time_total) / 1e6
        kind = _kind(event)
        if kind is not None:
            kinds[kind] += own
            operators[event.name] += own
    kinds["everything else"] = seconds - sum(kinds.values())
    largest = dict(sorted(operators.items(), key=lambda item: -item[1])[:12])
    return {"seconds": seconds, "kinds": kinds, "operators": largest}


def profile_table(profiled: dict[str, Any]) -> str:
    lines = [
        f"{kind:<16} {seconds:8.3f} s {seconds / profiled['seconds']:6.1%}"
        for kind, seconds in profiled["kinds"].items()
    ]
    largest = ", ".join(f"{name} {seconds:.3f}" for name, seconds in profiled["operators"].items())
    return "\n".join([*lines, f"largest operators: {largest}"])


def _kind(event: Any) -> str | None:
    names = list(_callers(event))
    if any(name.startswith(_COMMUNICATION) for name in names):
        return "communication"
    if OPTIMIZER in names:
        return "optimizer"
    if any(name.startswith(_ATTENTION) for name in names):
        return "attention"
    if event.name.startswith(_PRODUCTS):
        return "matrix products"
    return "elementwise" if event.name.startswith("aten::") else None


def _callers(event: Any) -> Iterator[str]:
    """The event's own name and those of all that it runs in."""
    while event is not None:
        yield event.name
        event = event.cpu_parent
