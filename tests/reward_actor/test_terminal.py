"""Our lines reach the terminal, and nothing else does; no line ends what runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from reward_actor.terminal import phase, put, say, warn


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_line_that_cannot_be_written_is_lost(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    for descriptor in (os.open("/dev/full", os.O_WRONLY), writing):
        stream = open(descriptor, "w", encoding="utf-8")  # noqa: SIM115
        monkeypatch.setattr(sys, name, stream)
        for tell in (say, warn):
            tell("a line")
        if name == "stdout":
            with pytest.raises(OSError, match=r"No space|Broken pipe"):
                put("a result")
        with pytest.raises(OSError, match=r"No space|Broken pipe"):
            stream.close()  # the line is still there, so the descriptor did take nothing


def test_where_lines_go(capsys: pytest.CaptureFixture[str]) -> None:
    say("a line")
    warn("what is odd")
    put("a result")
    with phase("loading"):  # said by commands only
        say("meanwhile")
    assert capsys.readouterr() == ("a line\na result\nmeanwhile\n", "warning: what is odd\n")


# What a library may do on its own: print, log, warn, write to the descriptors, start a process.
_OTHERS = """
import logging, os, subprocess, sys, warnings
{take}
print("theirs: print")
logging.getLogger("another.package").warning("theirs: log")
warnings.warn("theirs: warning")
os.write(2, b"theirs: descriptor\\n")
subprocess.run(["sh", "-c", "echo theirs: process >&2"], check=True)
"""


@pytest.mark.process
def test_what_libraries_print_goes_to_a_log(tmp_path: Path) -> None:
    take = (
        "from reward_actor import terminal\n"
        "terminal.take_over('test')\n"
        "os.write(1, b'theirs: output\\n')\n"
        "terminal.say('ours: line'); terminal.warn('ours')\n"
        "logging.getLogger('reward_actor.engine').warning('ours: %s', 'log')\n"
        "with terminal.phase('ours: loading'): pass\n"
    )
    code = _OTHERS.format(take=take)
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "ours: line\n"
    assert done.stderr == "warning: ours\nwarning: ours: log\nours: loading\n"
    (log,) = tmp_path.iterdir()
    assert log.stat().st_mode & 0o777 == 0o600
    kinds = ("output", "print", "log", "warning", "descriptor", "process")
    assert all(f"theirs: {kind}" in log.read_text() for kind in kinds)
    assert "ours" not in log.read_text().replace("theirs", "")


@pytest.mark.process
def test_a_workers_output_is_ours() -> None:
    take = (
        "from reward_actor import terminal\n"
        "terminal.keep_worker_output_for_ours()\n"
        "terminal.say('ours: line'); terminal.warn('ours')\n"
    )
    code = _OTHERS.format(take=take)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "ours: line\nwarning: ours\n"
    assert "theirs: print" in done.stderr
