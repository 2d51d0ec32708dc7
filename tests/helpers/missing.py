"""What a machine may lack: tests that need it are skipped, and the last lines say how to get it.

With RAYWARD_TEST_EVERYTHING set, as in `.ci/run`, a skipped test has failed, unless what it misses
is another device.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from typing import NoReturn

import pytest

EVERYTHING = "RAYWARD_TEST_EVERYTHING"

GPU = "NVIDIA GPU"
CPU = "machine without a GPU"
AVX = "AVX2 or AVX-512"
SKYWORK = "Skywork-Reward-V2-Qwen3-0.6B"
SOURCES = "source of a trainer"
_HOW = {
    "Chromium": "apt-get install chromium, or CHROMIUM=PATH make test",
    "small disk": "run as root, or where user namespaces are allowed",
    "vLLM": "make setup",
    "oneDNN": "install a build of torch that has it",
    GPU: "pytest -m cuda where there is one",
    AVX: "vLLM's CPU kernel is built for processors that have one of them",
    CPU: "vLLM's CPU engine takes no share of a GPU",
    SOURCES: "make test-integrations, where GitHub can be reached",
    SKYWORK: "download Skywork/Skywork-Reward-V2-Qwen3-0.6B, SKYWORK=DIRECTORY make test-long",
}


def skip_without(what: str, detail: str = "") -> NoReturn:
    """Skip the test that runs: the machine does not have `what`, one of those above."""
    assert what in _HOW, what
    pytest.skip(f"missing: {what}" + (f" ({detail})" if detail else ""))


def skip_without_vllm_kernels() -> None:
    """Skip the test that runs unless vLLM's kernels for CPUs can be called."""
    import torch

    from reward_actor import vllm_kernels

    if not vllm_kernels.is_here():
        has_avx = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
        skip_without("vLLM" if has_avx else AVX)


def is_failure(reason: str) -> bool:
    """Whether a test that was skipped for this reason has failed."""
    is_for_another_device = any(f"missing: {device}" in reason for device in (GPU, CPU, AVX))
    return bool(os.environ.get(EVERYTHING)) and not is_for_another_device


def told(reasons: Iterable[str]) -> list[str]:
    """A line for each thing that is missing, by the reasons of the skipped tests."""
    counts: Counter[str] = Counter()
    for reason in reasons:
        found = [what for what in _HOW if f"missing: {what}" in reason]
        counts[found[0] if found else reason.removeprefix("Skipped: ")] += 1
    return [
        f"{num} not run: " + (f"no {what}; {_HOW[what]}" if what in _HOW else what)
        for what, num in counts.items()
    ]
