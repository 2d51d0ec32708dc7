"""Lines for people, told to a file on a full disk and to a pipe that nobody reads."""

from __future__ import annotations

import os
import sys

import pytest

from trainer.console import say, warn


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_no_line_ends_a_training(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    for descriptor in (os.open("/dev/full", os.O_WRONLY), writing):
        stream = open(descriptor, "w", encoding="utf-8")  # noqa: SIM115
        monkeypatch.setattr(sys, name, stream)
        for tell in (say, warn):
            tell("a line")
        with pytest.raises(OSError, match=r"No space|Broken pipe"):
            stream.close()  # the line is still there, so the descriptor did take nothing


def test_where_lines_go(capsys: pytest.CaptureFixture[str]) -> None:
    say("a line")
    warn("what is odd")
    assert capsys.readouterr() == ("a line\n", "warning: what is odd\n")
