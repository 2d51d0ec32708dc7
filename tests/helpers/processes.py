"""Finds processes that tests started: through their parents, nursery or not, and by titles."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil
from nursery import FORKED


def descendants(process: psutil.Process) -> Iterator[psutil.Process]:
    """All that it started; behind a client, the program and what that started. A program may
    become a client in turn, as Ray's workers do."""
    try:
        name = Path(f"/proc/{process.pid}/comm").read_text().split()
        is_client = name[:1] == [FORKED]
        children = [psutil.Process(int(name[1]))] if is_client else process.children()
    except (OSError, psutil.NoSuchProcess):
        return
    for child in children:
        yield child
        yield from descendants(child)


def titled(name: str, processes: Iterable[psutil.Process] | None = None) -> list[psutil.Process]:
    """Those whose title begins so, Ray's workers say; among all that these tests started, where no
    others are given. A process may end while it is looked at."""
    found = []
    for process in psutil.Process().children(recursive=True) if processes is None else processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if "".join(process.cmdline()[:1]).startswith(name):
                found.append(process)
    return found
