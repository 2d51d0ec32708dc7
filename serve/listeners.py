"""Which process listens on a port, as Linux's /proc says."""

from __future__ import annotations

import contextlib
import os
import shlex
import textwrap
from pathlib import Path

_WIDTH = 160
"""Characters of a command line that are shown."""

_LISTENING = "0A"
"""TCP_LISTEN, as /proc/net/tcp has it."""


def listeners(port: int) -> list[str]:
    """The processes that listen on this port of any address: "process 123 (its command line)".

    None of other users, unless this is root's process; none where there is no /proc.
    """
    sockets = {f"socket:[{inode}]" for inode in _inodes(port)}
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            if sockets and any(os.readlink(file) in sockets for file in (place / "fd").iterdir()):
                command = (place / "cmdline").read_bytes().decode(errors="replace")
                line = shlex.join(filter(None, command.split("\0")))
                line = textwrap.shorten(line, _WIDTH, placeholder=" ...")
                found.append(f"process {place.name} ({line})")
    return sorted(found)


def _inodes(port: int) -> set[str]:
    """Of the sockets that listen there."""
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                fields = line.split()  # number, local and remote address, state, ..., inode
                if fields[3] == _LISTENING and int(fields[1].rpartition(":")[2], 16) == port:
                    found.add(fields[9])
    return found
