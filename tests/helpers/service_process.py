"""A service of a test's own: `rayward serve` in a process of its own, with a private cluster."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path
from types import TracebackType

import httpx
import psutil
from isolation import environment_for_a_cluster, free_port
from processes import descendants, titled

_START_S = 120.0


class Service:
    """`rayward serve MODEL ...` on a free port of 127.0.0.1, from ready until the block ends.

    Settings of these tests come first; `options` may override them.
    """

    def __init__(self, python: str, model: Path, *options: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        command = [python, "-m", "rayward", "serve", str(model), "--port", str(self.port)]
        command += ["--device", "cpu", "--cpus-per-replica", "0.5", "--threads-per-replica", "1"]
        self.process = subprocess.Popen(
            [*command, *options],
            env={**environment_for_a_cluster(), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def __enter__(self) -> Service:
        assert self.process.stdout is not None
        seen = []
        deadline = time.monotonic() + _START_S
        for line in self.process.stdout:
            seen.append(line)
            if line.startswith("ready"):
                return self
            assert time.monotonic() < deadline, "".join(seen)
        raise AssertionError("it ended early:\n" + "".join(seen))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.process.poll() is not None:  # the test has ended it
            return
        children = list(descendants(psutil.Process(self.process.pid)))
        self.process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(30)
        self.process.kill()
        self.process.wait()
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()

    def processes(self, name: str) -> list[psutil.Process]:
        """Those of this service whose title begins so."""
        return titled(name, descendants(psutil.Process(self.process.pid)))

    def replica_pids(self) -> list[int]:
        return [p.pid for p in self.processes("ray::ServeReplica:rayward:RewardModel")]

    def ingress_pids(self) -> list[int]:
        return [p.pid for p in self.processes("ray::ServeReplica:rayward:Ingress")]

    @staticmethod
    def kill(pid: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    def wait_for_replicas(self, count: int, timeout_s: float = 60.0) -> None:
        """Until so many replicas answer."""
        deadline = time.monotonic() + timeout_s
        while True:
            with contextlib.suppress(httpx.HTTPError, KeyError):
                info = httpx.get(f"{self.url}/info", timeout=10).json()
                if info["num_replicas"] == count and len(self.replica_pids()) == count:
                    return
            assert time.monotonic() < deadline, f"not {count} replicas in time"
            time.sleep(0.2)

    def memory_bytes(self) -> int:
        """Resident memory of ingress and replicas together."""
        return sum(p.memory_info().rss for p in self.processes("ray::ServeReplica:rayward"))

    def num_file_descriptors(self) -> int:
        return sum(p.num_fds() for p in self.processes("ray::ServeReplica:rayward"))
