"""The turns of the serving benchmark: one server at a time is started, measured and ended."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common.channel import ChildError
from benchmarks.common.processes import Server, answers, free_port, started_at, title_of
from benchmarks.common.report import max_abs_diff
from benchmarks.common.rounds import TOLERANCES, Setting
from benchmarks.serving.peers import Peer
from benchmarks.serving.workloads import PROTOCOLS, Asked, write_requests

ROOT = Path(__file__).resolve().parents[2]

_READY_TIMEOUT_S = 300.0
_RESTART_TIMEOUT_S = 120.0
# OpenMP threads spin for a while after their work, and a server has to drop what was cut off.
_PAUSE_S = 1.0
_NUM_CHECKED = 2
# What the load of a workload's second measurement is made of: a cache must not know it yet.
HALF = "groups_half"


@dataclass(frozen=True)
class Turn:
    """A server with one of the models: "full", of the shape asked for, or "empty", tiny."""

    peer: Peer
    model: str


@dataclass(frozen=True)
class Times:
    """Seconds of load before a window and in it, and clients of each closed loop."""

    warm_up_s: float
    duration_s: float
    group_clients: int
    single_clients: int
    empty_clients: int


@dataclass
class Turns:
    """Measures turns; `runs[measurement][label]` grows by one entry for each of them.

    asked: what is asked by the name of its workload. rate: requests/s of the half load; None until
    vLLM's server (or, without it, the first one) has shown its capacity.
    """

    setting: Setting
    times: Times
    models: Mapping[str, Path]
    asked: Mapping[str, Sequence[Asked]]
    wanted: Sequence[str]
    scratch: Path
    rate: float | None = None
    runs: dict[str, dict[str, list[dict[str, Any]]]] = field(default_factory=dict)
    largest_diff: dict[str, float] = field(default_factory=dict)
    _reference: dict[str, list[float]] = field(default_factory=dict)

    def run(self, turn: Turn) -> None:
        """Raises ChildError where a server fails, ValueError for rewards that are not its equals'
        or requests that were not answered."""
        peer = turn.peer
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        command = peer.command(self.models[turn.model], port)
        environment = {**self.setting.environment(), **peer.environment, "PYTHONPATH": _path()}
        log = self.scratch / f"{peer.name}.log"
        with Server(peer.name, command, environment, log) as server:
            ready_s = server.wait_until_ready(port, peer.ready_path, _READY_TIMEOUT_S)
            if turn.model == "full":
                self._note("server start", peer.name, {"seconds": ready_s})
                self._measure_full(peer, server, url)
            else:
                self._measure_empty(peer, server, url)

    def _measure_full(self, peer: Peer, server: Server, url: str) -> None:
        clients = self.times.group_clients
        ways = peer.protocols.get("groups", ()) if "groups" in self.wanted else ()
        for way in ways:
            label = _label(peer, way, ways)
            flags = ["--connections", str(clients)]
            figures = self._load(server, url, "groups", "groups", way, label, flags)
            if self.rate is None:
                self.rate = 0.5 * figures["requests_per_s"]
            flags = ["--connections", "256", "--rate", str(self.rate)]
            self._load(server, url, HALF, HALF, way, label, flags)
        ways = peer.protocols.get("singles", ()) if "singles" in self.wanted else ()
        for way in ways:
            label = _label(peer, way, ways)
            # OpenRLHF's client opens a connection for each request.
            flags = ["--connections", str(self.times.single_clients), "--new-connections"]
            self._load(server, url, "singles", "singles", way, label, flags)
        if "start" in self.wanted and peer.is_ours and peer.num_replicas == 1:
            self._note("replica start", peer.name, restart_replica(server, url + peer.ready_path))

    def _measure_empty(self, peer: Peer, server: Server, url: str) -> None:
        [way] = peer.protocols["empty"]
        if "empty" in self.wanted:
            for clients in (1, self.times.empty_clients):
                name = f"empty, {clients} client{'s' if clients > 1 else ''}"
                flags = ["--connections", str(clients)]
                self._load(server, url, name, "empty", way, peer.name, flags)
        if "handle" in self.wanted and peer.is_ours:
            found = re.search(r"^Ray\s+(\S+)$", server.log, re.MULTILINE)
            assert found is not None, "`rayward serve` says where its cluster is"
            command = ["benchmarks.serving.handle_calls", found[1], *self._window()]
            # A driver of the service's own cluster has the service's environment.
            figures = _json_of(command, self.setting.environment())
            self._note("handle", peer.name, figures)

    def _load(
        self,
        server: Server,
        url: str,
        measurement: str,
        workload: str,
        way: str,
        label: str,
        flags: Sequence[str],
    ) -> dict[str, Any]:
        self._check(url, workload, way, label)
        path = self.scratch / f"{workload}-{way}.jsonl"
        if not path.exists():
            write_requests(path, self.asked[workload], PROTOCOLS[way])
        time.sleep(_PAUSE_S)
        before, started = server.cpu_seconds(), time.monotonic()
        figures = _json_of(["benchmarks.serving.load", url, str(path), *flags, *self._window()], {})
        elapsed = time.monotonic() - started
        after = server.cpu_seconds()
        figures["cpu_shares"] = {
            title: round(share, 3)
            for title in sorted(after)
            if (share := (after[title] - before.get(title, 0.0)) / elapsed) >= 0.005
        }
        self._note(measurement, label, figures)
        return figures

    def _window(self) -> list[str]:
        times = self.times
        return ["--warm-up-s", str(times.warm_up_s), "--duration-s", str(times.duration_s)]

    def _check(self, url: str, workload: str, way: str, label: str) -> None:
        """Raise ValueError unless the rewards are those of whoever was asked first."""
        protocol = PROTOCOLS[way]
        rewards: list[float] = []
        for asked in self.asked[workload][:_NUM_CHECKED]:
            request = protocol.request(asked)
            reply = _post(url + request.path, request.content_type, request.body)
            found = protocol.decode(reply, asked.group)
            if len(found) != len(asked.group) or None in found:
                raise ValueError(f"{label} did not score every completion of {workload}")
            rewards += [float(reward) for reward in found if reward is not None]
        reference = self._reference.setdefault(workload, rewards)
        difference = max_abs_diff(rewards, reference)
        self.largest_diff[label] = max(difference, self.largest_diff.get(label, 0.0))
        tolerance = TOLERANCES[self.setting.dtype]
        if not difference <= tolerance:
            raise ValueError(
                f"{workload}: rewards of {label} differ from those of the first server by "
                f"{difference:.3g}; {tolerance:g} is tolerated"
            )

    def _note(self, measurement: str, label: str, figures: dict[str, Any]) -> None:
        self.runs.setdefault(measurement, {}).setdefault(label, []).append(figures)


def restart_replica(server: Server, ready_url: str) -> dict[str, float]:
    """Kill the only replica and watch its successor: seconds until it has described itself to the
    ingress, since its process began and since the kill. Raises ChildError."""
    [old] = _replicas(server)
    killed = time.monotonic()
    os.kill(old, signal.SIGKILL)
    new: set[int] = set()
    while not new or not answers(ready_url):
        new = _replicas(server) - {old}
        if time.monotonic() - killed > _RESTART_TIMEOUT_S:
            raise ChildError(f"no replica is ready {_RESTART_TIMEOUT_S:g} s after one was killed")
        time.sleep(0.02)
    ready = time.monotonic()
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - started_at(max(new))
    return {"seconds": age, "since_kill_s": ready - killed}


def _replicas(server: Server) -> set[int]:
    found = set()
    for pid in server.pids:
        try:
            if title_of(pid) == "RewardModel":
                found.add(pid)
        except OSError:
            continue
    return found


def _label(peer: Peer, way: str, ways: Sequence[str]) -> str:
    return peer.name if way == ways[0] else f"{peer.name}_{way}"


def _path() -> str:
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


def _json_of(arguments: Sequence[str], environment: Mapping[str, str]) -> dict[str, Any]:
    """What a module of ours prints. Raises ChildError."""
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        env={**os.environ, **environment, "PYTHONPATH": _path()},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise ChildError(f"{arguments[0]} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def _post(url: str, content_type: str, body: bytes) -> bytes:
    """Raises ChildError for anything but 200."""
    request = urllib.request.Request(url, body, {"Content-Type": content_type})
    try:
        with urllib.request.urlopen(request, timeout=120) as reply:
            answer: bytes = reply.read()
            return answer
    except urllib.error.HTTPError as error:
        why = error.read(1000).decode(errors="replace")
        raise ChildError(f"POST {url}: {error.code} {why}") from error
    except OSError as error:
        raise ChildError(f"POST {url}: {error}") from error
