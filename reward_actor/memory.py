"""How many tokens fit in one forward pass, and what running out of memory looks like."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from reward_actor.extract import RewardModel

# Beyond these a larger batch is no faster: it takes memory and makes others wait.
_LARGEST_BUDGET = {"cpu": 16_384, "cuda": 65_536}
LEAST_BUDGET = 256
_CGROUP = "/sys/fs/cgroup"
_SHARE_OF_FREE_MEMORY = {"cpu": 0.25, "cuda": 0.5}


def default_budget(model: RewardModel) -> int:
    """Tokens in one forward pass, such that its activations take a share of the free memory."""
    device = model.device
    kind = "cuda" if device.type == "cuda" else "cpu"
    free = free_device_memory(device) if kind == "cuda" else free_host_memory()
    fitting = int(free * _SHARE_OF_FREE_MEMORY[kind] / bytes_per_token(model))
    return max(LEAST_BUDGET, min(_LARGEST_BUDGET[kind], fitting))


def bytes_per_token(model: RewardModel) -> int:
    """An upper estimate of the activations of one token in the widest layer.

    Counted at once: the residual and its normed copy, queries, keys and values with their turned
    and gathered copies (8 hidden widths), and a gated feed-forward's three widths.
    """
    parameter = next(model.parameters())
    config = model.network.config.get_text_config()
    hidden = int(config.hidden_size)
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    return int((8 * hidden + 3 * inner) * parameter.element_size() + 8 * hidden * 4)


def free_device_memory(device: torch.device) -> int:
    """Bytes that PyTorch can still hand out: what the device has, and what PyTorch keeps unused."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0] + kept)


def free_host_memory() -> int:
    """Bytes that this process can still take: the machine's, or its container's if that is less."""
    free = _proc_available()
    limit, used = Path(_CGROUP, "memory.max"), Path(_CGROUP, "memory.current")
    if limit.exists() and used.exists() and (text := limit.read_text().strip()) != "max":
        # Files in the page cache (the weights that were just read) give way when asked.
        stat = dict(line.split() for line in Path(_CGROUP, "memory.stat").read_text().splitlines())
        cached = int(stat.get("inactive_file", 0)) + int(stat.get("active_file", 0))
        free = min(free, max(0, int(text) - int(used.read_text()) + cached))
    return free


def _proc_available() -> int:
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return 4 * 2**30  # another system: assume little
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 4 * 2**30


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host refused memory. PyTorch's CPU allocator has no type of its own
    for it."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    return "can't allocate memory" in text or "out of memory" in text
