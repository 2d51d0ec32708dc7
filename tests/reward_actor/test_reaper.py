"""The reaper: what a process started, and its folder, do not outlive it, even when it is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from reward_actor.reaper import Reaper

pytestmark = pytest.mark.process

# As an engine core does: a child of another session that ignores requests to end, with one of its
# own, under a title that covers what /proc shows of the environment.
CHILD = """
import signal, subprocess, sys, time
import setproctitle

signal.signal(signal.SIGTERM, signal.SIG_IGN)
if len(sys.argv) == 2:
    command = [sys.executable, __file__, sys.argv[1], "grandchild"]
    subprocess.Popen(command, start_new_session=True)
setproctitle.setproctitle(sys.argv[1] + "x" * 200)
time.sleep(600)
"""
STARTER = """
import os, subprocess, sys, time
from pathlib import Path

from reward_actor.reaper import Reaper

reaper = Reaper(Path(sys.argv[1]))
environment = {**os.environ, **reaper.environment}
subprocess.Popen([sys.executable, *sys.argv[2:]], env=environment, start_new_session=True)
print("started", flush=True)
time.sleep(600)
"""


def called(title: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if "".join(process.cmdline()).startswith(title):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return found


def wait_for(count: int, title: str) -> None:
    deadline = time.monotonic() + 20
    while len(called(title)) != count:
        assert time.monotonic() < deadline, called(title)
        time.sleep(0.05)


def wait_until_removed(folder: Path) -> None:
    deadline = time.monotonic() + 20
    while folder.exists():
        assert time.monotonic() < deadline, folder
        time.sleep(0.05)


def test_children_end_with_a_killed_process_and_with_close(tmp_path: Path) -> None:
    child, title = tmp_path / "child.py", f"reaped-{os.getpid()}-"
    child.write_text(CHILD)
    arguments = [str(child), title]
    folder, other = tmp_path / "folder", tmp_path / "other"
    for each in (folder, other):
        each.mkdir()
        (each / "link").symlink_to(child)
    reaper = Reaper(folder)
    ours = subprocess.Popen([sys.executable, *arguments], env={**os.environ, **reaper.environment})
    command = [sys.executable, "-c", STARTER, str(other), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as starter:
        assert starter.stdout is not None
        assert starter.stdout.readline() == b"started\n"
        wait_for(4, title)
        starter.send_signal(signal.SIGKILL)
        wait_for(2, title)  # its own are gone; ours carry another mark
    wait_until_removed(other)
    assert ours.poll() is None
    assert folder.exists()
    reaper.close()
    assert called(title) == []
    assert ours.wait(5) == -signal.SIGKILL
    assert not folder.exists()
    assert child.exists(), "what a link in it names is not its own"


def test_a_reaper_outlives_whoever_another_one_kills(tmp_path: Path) -> None:
    """As an engine's outlives the replica that the service's reaper kills."""
    child, title = tmp_path / "child.py", f"nested-{os.getpid()}-"
    child.write_text(CHILD)
    reaper = Reaper()
    command = [sys.executable, "-c", STARTER, str(tmp_path / "none"), str(child), title]
    environment = {**os.environ, **reaper.environment}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as starter:
        assert starter.stdout is not None
        assert starter.stdout.readline() == b"started\n"
        wait_for(2, title)
        reaper.close()
        assert starter.wait(5) == -signal.SIGKILL
        wait_for(0, title)
