"""Ends the processes that a process has started when it ends itself, however that happens.

A process that is killed cannot end its children: a vLLM engine core that has lost its parent waits
for ever, with its share of a GPU's memory, and HAProxy listens for ever in front of nothing. So a
small second process reads from a pipe that only the first one can write to. When the pipe closes,
it kills every process that has inherited a variable of the environment, and removes a folder.
Reads /proc, so on Linux only. Standard library only: it runs as a script, too.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

VARIABLE = "RAYWARD_REAPED_BY"
_KILL_TIMEOUT_S = 10.0


class Reaper:
    """Processes that are started with `environment` end with this process, or with `close`, and so
    does the folder."""

    def __init__(self, folder: Path | None = None) -> None:
        mark = secrets.token_hex(16)
        # setproctitle would otherwise write over what /proc tells of a process's environment.
        self.environment = {VARIABLE: mark, "SPT_NOENV": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, mark, *([] if folder is None else [folder])],
            stdin=subprocess.PIPE,
            # Not by another's reaper before it has done its work.
            env={name: value for name, value in os.environ.items() if name != VARIABLE},
            start_new_session=True,  # a signal to our group must not end it before us
        )

    def close(self) -> None:
        """Kill what is left, remove the folder, and wait until nothing is left."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def _kill(mark: str) -> bool:
    """Kill every process that carries the mark, and wait for its end; whether there was one."""
    entry = f"{VARIABLE}={mark}".encode()
    was_one = False
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            process = os.pidfd_open(int(place.name))  # before it is read, so that it is the same
            try:
                if entry in (place / "environ").read_bytes().split(b"\0"):
                    was_one = True
                    signal.pidfd_send_signal(process, signal.SIGKILL)
                    select.select([process], [], [], _KILL_TIMEOUT_S)
            finally:
                os.close(process)
    return was_one


def main() -> None:
    sys.stdin.buffer.read()
    deadline = time.monotonic() + _KILL_TIMEOUT_S
    while _kill(sys.argv[1]) and time.monotonic() < deadline:
        pass  # the killed may have started others meanwhile
    for folder in sys.argv[2:]:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
