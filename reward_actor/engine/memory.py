"""How many tokens fit in one forward pass, and what running out of memory looks like."""

from __future__ import annotations

import ctypes
import gc
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

if TYPE_CHECKING:
    from reward_actor.model.reward_model import RewardModel

# Beyond these a larger batch is no faster: it takes memory and makes others wait.
_MAX_BUDGET = {"cpu": 16_384, "cuda": 65_536}
LEAST_BUDGET = 256
_CGROUP = "/sys/fs/cgroup"
_SHARE_OF_FREE_MEMORY = {"cpu": 0.25, "cuda": 0.5}
CONTEXT_BYTES = 768 * 2**20
"""What a process takes of a GPU beside PyTorch's tensors: CUDA's context, kernels, workspaces."""


def default_budget(model: RewardModel, memory_share: float = 1.0) -> int:
    """Tokens in one forward pass, such that its activations take a part of the free memory.

    memory_share: of the device's memory, what is this process's; others may be about to take the
    rest, so that it does not count however free it is.
    """
    device = model.device
    kind: Literal["cpu", "cuda"] = "cuda" if device.type == "cuda" else "cpu"
    if kind == "cuda":
        allowed = allowed_bytes(torch.cuda.mem_get_info(device)[1], memory_share)
        free = min(free_device_memory(device), allowed - torch.cuda.memory_allocated(device))
    else:
        free = free_host_memory()
    return budget_within(free, model, kind)


def budget_within(free: float, model: RewardModel, kind: Literal["cpu", "cuda"]) -> int:
    """Tokens in one forward pass on a kind of device with so many bytes free."""
    fitting = int(free * _SHARE_OF_FREE_MEMORY[kind] / bytes_per_token(model))
    return max(LEAST_BUDGET, min(_MAX_BUDGET[kind], fitting))


def allowed_bytes(total: int, memory_share: float) -> int:
    """Of a GPU's `total` bytes those that PyTorch may fill in a process with this share of it.

    Raises ValueError for a share that leaves nothing.
    """
    if memory_share >= 1.0:
        return total
    allowed = int(total * memory_share) - CONTEXT_BYTES
    if allowed <= 0:
        raise ValueError(
            f"a share of {memory_share:g} of a GPU with {total / 2**30:.1f} GiB leaves no room for "
            "a model; use a larger gpus_per_replica"
        )
    return allowed


def limit_to_share(device: torch.device, memory_share: float) -> None:
    """Let PyTorch run out of memory here before it takes what belongs to another process."""
    if device.type == "cuda" and memory_share < 1.0:
        total = torch.cuda.mem_get_info(device)[1]
        fraction = allowed_bytes(total, memory_share) / total
        torch.cuda.set_per_process_memory_fraction(fraction, device)


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


def move(module: torch.nn.Module, device: torch.device) -> None:
    """Put a module's tensors on this device; whoever refers to them finds them there. In host
    memory they are pinned where a GPU is, so that they return at the bus's full speed; PyTorch
    rounds each up to a power of two there, and keeps it until `give_back`."""
    is_pinned = device.type == "cpu" and torch.cuda.is_available()
    for tensor in chain(module.parameters(), module.buffers()):
        target = torch.empty_like(tensor, device=device, pin_memory=is_pinned)
        tensor.data = target.copy_(tensor.data)


def give_back() -> None:
    """Return to the device, and to the system, memory that nobody refers to any more."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        empty_host_cache = getattr(torch.accelerator, "empty_host_cache", None)
        if empty_host_cache is not None:  # not in every torch
            empty_host_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's: it keeps what was freed
    if trim is not None:
        trim(0)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host refused memory. PyTorch's CPU allocator has no type of its own
    for it, and oneDNN does not say why it has no room for its code."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    signs = ("can't allocate memory", "out of memory", "could not create a primitive")
    return any(sign in text for sign in signs)
