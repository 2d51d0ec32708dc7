"""The servers under test: how each is started, when it is ready, what it is asked.

They have the same weights, dtype and number of threads, and the same libraries are preloaded.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common import vllm_peer
from benchmarks.common.rounds import Setting
from benchmarks.common.shapes import SHAPES

NAMES = ("vllm", "ours", "plain_ray_serve", "one_at_a_time")


@dataclass(frozen=True)
class Peer:
    """A server. arguments: after `python -m`, with {model} and {port} to be filled in.

    protocols: for each workload that it takes, the names in `PROTOCOLS` of the ways to ask.
    """

    name: str
    arguments: Sequence[str]
    protocols: Mapping[str, Sequence[str]]
    ready_path: str
    environment: Mapping[str, str] = field(default_factory=dict)
    num_replicas: int = 1

    def command(self, model: Path, port: int) -> list[str]:
        filled = [word.format(model=model, port=port) for word in self.arguments]
        return [sys.executable, "-m", *filled]

    @property
    def is_ours(self) -> bool:
        return self.name.startswith("ours")


def make_peers(
    names: Sequence[str], sizes: Sequence[tuple[int, int]], setting: Setting
) -> list[Peer]:
    """The peers of these names; ours once for each (replicas, threads of a replica)."""
    peers = []
    for name in NAMES:
        if name not in names:
            continue
        match name:
            case "ours":
                peers += [_ours(*size, setting) for size in sizes]
            case "vllm":
                peers.append(_vllm(setting))
            case "plain_ray_serve":
                peers.append(_plain_ray_serve(setting))
            case "one_at_a_time":
                peers.append(_one_at_a_time(setting))
    return peers


def choose(wanted: str) -> tuple[list[str], dict[str, str]]:
    """The names to run, and for each other one that was asked for why it cannot.

    wanted: names with commas between, or "all". Raises ValueError for an unknown name.
    """
    names = list(NAMES) if wanted == "all" else wanted.split(",")
    for name in names:
        if name not in NAMES:
            raise ValueError(f"--peers: {name!r} is not one of {', '.join(NAMES)}")
    skipped = {}
    if "vllm" in names and importlib.util.find_spec("vllm") is None:
        skipped["vllm"] = "vllm is not installed"
    return [name for name in names if name not in skipped], skipped


def parse_sizes(text: str) -> list[tuple[int, int]]:
    """Replicas x threads, "1x2,2x1". Raises ValueError."""
    sizes = []
    for part in text.split(","):
        match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", part)
        if match is None:
            raise ValueError(f"--ours: {part!r} is not REPLICASxTHREADS")
        sizes.append((int(match[1]), int(match[2])))
    return sizes


def _ours(num_replicas: int, threads: int, setting: Setting) -> Peer:
    flags: dict[str, Any] = {
        "port": "{port}",
        "device": "cpu",
        "dtype": setting.dtype,
        "num-replicas": num_replicas,
        "threads-per-replica": threads,
    }
    return Peer(
        f"ours_{num_replicas}x{threads}",
        ["rayward", "serve", "{model}", *_as_words(flags)],
        {"groups": ("native", "binary"), "singles": ("openrlhf",), "empty": ("native",)},
        "/ready",
        num_replicas=num_replicas,
    )


def _vllm(setting: Setting) -> Peer:
    longest = SHAPES[setting.shape].max_position_embeddings
    order = {
        "dtype": setting.dtype,
        "shape": setting.shape,
        "device": "cpu",
        "longest": longest,
        "vllm": setting.vllm,
    }
    flags = {
        "model": "{model}",
        "runner": "pooling",
        "host": "127.0.0.1",
        "port": "{port}",
        "disable-uvicorn-access-log": True,
        **{k.replace("_", "-"): v for k, v in vllm_peer.engine_arguments(order).items()},
    }
    environment = vllm_peer.environment(setting.threads, "cpu", setting.vllm)
    # The offline engine of `benchmarks.scoring` spares a process; a server has one for its engine.
    del environment["VLLM_ENABLE_V1_MULTIPROCESSING"]
    return Peer(
        "vllm",
        ["vllm.entrypoints.openai.api_server", *_as_words(flags)],
        {"groups": ("vllm",), "singles": ("vllm",)},
        "/health",
        environment,
    )


def _plain_ray_serve(setting: Setting) -> Peer:
    return Peer(
        "plain_ray_serve",
        ["benchmarks.serving.baselines.plain_ray_serve", "{model}", *_own_flags(setting)],
        {"groups": ("plain",), "singles": ("plain",), "empty": ("plain",)},
        "/",
    )


def _one_at_a_time(setting: Setting) -> Peer:
    return Peer(
        "one_at_a_time",
        ["benchmarks.serving.baselines.one_at_a_time", "{model}", *_own_flags(setting)],
        {"singles": ("openrlhf",)},
        "/health",
    )


def _own_flags(setting: Setting) -> list[str]:
    flags = {"port": "{port}", "dtype": setting.dtype, "threads": setting.threads}
    return _as_words(flags)


def _as_words(flags: Mapping[str, Any]) -> list[str]:
    """Command-line words of flags; True is a flag without a value."""
    words = []
    for name, value in flags.items():
        words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words
