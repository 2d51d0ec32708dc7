"""The children of a benchmark and their turns: one works, the others wait."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common import vllm_peer
from benchmarks.common.channel import Child, Message
from benchmarks.common.report import max_abs_diff
from benchmarks.common.workloads import Workload

PEERS = ("ours", "padded_16", "padded_sorted", "vllm", "sglang", "flash")
# Engines that load a directory, and measure the free memory while they do.
_ENGINES = ("vllm", "sglang")
# Rewards spread by about 1, and a wrong mask or position moves them by tenths. float32 leaves the
# order of summation; bfloat16 rounds to three digits in every layer.
TOLERANCES = {"float32": 1e-4, "bfloat16": 0.25}
# OpenMP threads spin for up to 200 ms after their work, which must not fall into the next peer's.
_PAUSE_S = 0.3


def choose_peers(wanted: str, device: str) -> tuple[list[str], dict[str, str]]:
    """The peers to run, ours first, and for each other one that was asked for why it cannot.

    wanted: names with commas between, or "auto". Raises ValueError for an unknown name.
    """
    names = list(PEERS) if wanted == "auto" else wanted.split(",")
    for name in names:
        if name not in PEERS:
            raise ValueError(f"--peers: {name!r} is not one of {', '.join(PEERS)}")
    reasons = {}
    for name in _ENGINES:
        if importlib.util.find_spec(name) is None:
            reasons[name] = f"{name} is not installed"
    if device == "cpu":
        reasons["flash"] = "variable-length attention needs CUDA"
    kept = [name for name in PEERS if name in names and name not in reasons]
    if not kept:
        raise ValueError(f"--peers {wanted}: {'; '.join(reasons.values())}")
    return kept, {name: why for name, why in reasons.items() if name in names}


@dataclass
class Setting:
    """What all children share. `vllm`: overrides for that peer, see `vllm_peer`."""

    shape: str
    device: str
    dtype: str
    threads: int
    preloads: Sequence[str] = ()
    vllm: Mapping[str, Any] = field(default_factory=dict)

    def environment(self) -> dict[str, str]:
        variables = {"OMP_NUM_THREADS": str(self.threads), "TOKENIZERS_PARALLELISM": "false"}
        if self.preloads:
            before = filter(None, [os.environ.get("LD_PRELOAD")])
            variables["LD_PRELOAD"] = ":".join([*self.preloads, *before])
        return variables


class Rounds:
    """Starts the children; `runs[workload][mode]` and `matmul` grow by one entry each round."""

    def __init__(self, setting: Setting, scratch: Path, stack: contextlib.ExitStack) -> None:
        """`scratch` holds logs and weights; `stack` ends the children. Raises ChildError."""
        self._setting = setting
        self._scratch = scratch
        self._stack = stack
        self._environment = setting.environment()
        self._children: list[Child] = []
        self._reference: dict[str, list[float]] = {}
        self.runs: dict[str, dict[str, list[Message]]] = {}
        self.matmul: list[Message] = []
        self._order: Message = {
            "shape": setting.shape,
            "device": setting.device,
            "dtype": setting.dtype,
            "threads": setting.threads,
        }
        self._probe = self._start("common.probe", "probe", self._order, {})
        if setting.dtype == "auto":
            self._order["dtype"] = self.machine["dtype"]

    @property
    def machine(self) -> Message:
        """What the probe found: `dtype` (auto resolved), `machine`, `versions`."""
        return self._probe.ready

    @property
    def peers(self) -> dict[str, Message]:
        """The settings of every peer."""
        return {child.name: child.ready["settings"] for child in self._children}

    def start_peers(self, peers: Sequence[str], workloads: Sequence[Workload]) -> None:
        """Start the children and let one after the other warm up. Raises ChildError."""
        path = self._scratch / "workloads.json"
        path.write_text(json.dumps({w.name: w.sequences for w in workloads}))
        for peer in peers:
            order = {**self._order, "peer": peer, "workloads": str(path)}
            more = {}
            if peer in _ENGINES:
                model_dir = self._scratch / "model"
                self._probe.ask({"save": str(model_dir)})
                order["model_dir"] = str(model_dir)
                order["longest"] = max(len(s) for w in workloads for s in w.sequences)
                self._wait_for_children()
            if peer == "vllm":
                setting = self._setting
                more = vllm_peer.environment(setting.threads, setting.device, setting.vllm)
                order["vllm"] = dict(setting.vllm)
            self._children.append(self._start("scoring.peers", peer, order, more))
            if peer in _ENGINES:
                self._wait_for_children()
        self._wait_for_children()
        for child in self._children:
            for workload in workloads:
                child.ready.update(child.ask({"workload": workload.name, "warm_up": True}))
        self.runs = {workload.name: {} for workload in workloads}

    def run(self, number: int) -> None:
        """Round `number`: every workload through every peer, the first peer another each round.

        Raises ValueError when a peer's rewards are not those of the first peer.
        """
        time.sleep(_PAUSE_S)
        self.matmul.append(self._probe.ask({}))
        shift = number % len(self._children)
        for workload, runs in self.runs.items():
            for child in self._children[shift:] + self._children[:shift]:
                time.sleep(_PAUSE_S)
                for mode, run in child.ask({"workload": workload}).items():
                    self._compare(workload, mode, run)
                    runs.setdefault(mode, []).append(run)

    def _wait_for_children(self) -> None:
        for child in self._children:
            assert child.ready is not None

    def _compare(self, workload: str, mode: str, run: Message) -> None:
        """Replace a run's rewards by their difference from those of the first peer's first run."""
        rewards = run.pop("rewards")
        reference = self._reference.setdefault(workload, rewards)
        run["max_abs_diff"] = max_abs_diff(rewards, reference)
        tolerance = TOLERANCES[self._order["dtype"]]
        if not run["max_abs_diff"] <= tolerance:  # NaN fails, too
            raise ValueError(
                f"{workload}: rewards of {mode} differ from those of {self._children[0].name} by "
                f"{run['max_abs_diff']:.3g}; {tolerance:g} is tolerated"
            )

    def _start(
        self, module: str, name: str, order: Message, environment: Mapping[str, str]
    ) -> Child:
        child = Child(module, name, order, {**self._environment, **environment}, self._scratch)
        self._stack.callback(child.close)
        return child
