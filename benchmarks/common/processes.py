"""Servers as child processes: started, waited for, looked at, and ended with all they started."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks.common.channel import ChildError

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_LIBC = ctypes.CDLL(None, use_errno=True)
_GRACE_S = 15.0
_KILL_S = 10.0
_POLL_S = 0.02
_LOG_TAIL_CHARACTERS = 3000
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def adopt_orphans() -> None:
    """Become the parent of whatever a child leaves behind (prctl(2)): so it can be found and ended.

    For a process that ends every descendant that it did not have before, as `Server` does.
    """
    if _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def _end_with_parent() -> None:
    """In a child: SIGTERM when its parent is gone, even killed."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def end_on_sigterm() -> None:
    """SIGTERM ends this process as Ctrl-C does: with the servers that it has started."""

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, end)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """One command with all its descendants. Use as a context; one at a time."""

    def __init__(
        self, name: str, command: Sequence[str], environment: Mapping[str, str], log: Path
    ) -> None:
        """Start it in a process group of its own. Its output goes to `log`."""
        self.name = name
        self._log = log
        self._before = descendants(os.getpid())
        self._started = time.monotonic()
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def pids(self) -> set[int]:
        """Everything that it has started and that lives, orphans too."""
        return descendants(os.getpid()) - self._before

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def wait_until_ready(self, port: int, path: str, timeout_s: float) -> float:
        """Seconds from its start to the first 200 from this path. Raises ChildError."""
        while not (self._listens(port) and answers(f"http://127.0.0.1:{port}{path}")):
            if self._process.poll() is not None:
                raise ChildError(f"{self.name} ended with {self._process.returncode}{self._tail}")
            if time.monotonic() - self._started > timeout_s:
                raise ChildError(f"{self.name} is not ready after {timeout_s:g} s{self._tail}")
            time.sleep(_POLL_S)
        return time.monotonic() - self._started

    def _listens(self, port: int) -> bool:
        """Whether it is one of its own processes that does: a port may be taken by others."""
        sockets = listening_sockets(port)
        for pid in self.pids if sockets else ():
            with contextlib.suppress(OSError):
                links = {os.readlink(file) for file in Path(f"/proc/{pid}/fd").iterdir()}
                if links & sockets:
                    return True
        return False

    def cpu_seconds(self) -> dict[str, float]:
        """CPU time of its living processes so far, added up by what they are called."""
        spent: dict[str, float] = {}
        for pid in self.pids:
            with contextlib.suppress(OSError):  # it has ended
                title = title_of(pid)
                spent[title] = spent.get(title, 0.0) + cpu_seconds_of(pid)
        return spent

    def stop(self) -> None:
        """Ask it to end, kill what is left after a while, and see everything gone."""
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_GRACE_S)
        deadline = time.monotonic() + _KILL_S
        while left := self.pids:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if self._process.returncode is None:
                self._process.wait()
            for pid in left - {self._process.pid}:
                with contextlib.suppress(ChildProcessError):  # not ours yet
                    os.waitpid(pid, os.WNOHANG)
            if time.monotonic() > deadline:
                raise ChildError(f"{self.name}: processes {sorted(left)} cannot be ended")
            time.sleep(_POLL_S)

    @property
    def _tail(self) -> str:
        return f"; its log:\n{self.log[-_LOG_TAIL_CHARACTERS:]}"


def answers(url: str) -> bool:
    """Whether a GET of `url` is answered with 200."""
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def listening_sockets(port: int) -> set[str]:
    """The sockets that listen on a TCP port, IPv4, as /proc/PID/fd names them."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    listening = "0A"
    return {
        f"socket:[{row[9]}]"
        for row in rows
        if row[3] == listening and int(row[1].partition(":")[2], 16) == port
    }


def descendants(pid: int) -> set[int]:
    """The living processes below a process."""
    children: dict[int, list[int]] = {}
    for each in _all_pids():
        with contextlib.suppress(OSError):
            children.setdefault(int(_stat(each)[1]), []).append(each)
    found: set[int] = set()
    waiting = [pid]
    while waiting:
        below = children.get(waiting.pop(), [])
        found.update(below)
        waiting += below
    return found


def title_of(pid: int) -> str:
    """What a process calls itself: a Ray actor's name, a module, or the program. Raises OSError."""
    words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    name = words[0].split(" ")[0]
    if "::" in name:  # ray::ServeReplica:APP:DEPLOYMENT, with the method at times
        return name.partition(".")[0].rpartition(":")[2]
    if "-m" in words[:3]:
        return words[words.index("-m") + 1]
    return Path(name).name or "ended"


def cpu_seconds_of(pid: int) -> float:
    """User and system time of a process and of its children that it has waited for."""
    return sum(int(ticks) for ticks in _stat(pid)[11:15]) / _TICKS_PER_S


def started_at(pid: int) -> float:
    """When a process began, on the clock of `time.clock_gettime(CLOCK_BOOTTIME)`."""
    return int(_stat(pid)[19]) / _TICKS_PER_S


def _all_pids() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdecimal())


def _stat(pid: int) -> list[str]:
    """The fields of proc(5)'s stat from `state`, the third, on. Raises OSError."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
