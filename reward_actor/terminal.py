"""What people see: our own lines. What other libraries print goes to a log file.

In a command, `out()` and `err()` are the terminal's, while `sys.stdout`, `sys.stderr` and the file
descriptors 1 and 2, which libraries and child processes write to, lead to the log. On a Ray worker
our lines are its standard output, which the driver prints as they come
(`reward_actor.ray_internals.take_worker_lines`), and all else is its standard error.

A full disk under a log, or a pipe that nobody reads any more, must not end what runs, so a line
that cannot be written is lost.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live
    from rich.progress import Progress

PACKAGES = ("rayward", "reward_actor", "trainer", "serve")
_ROOT = Path(__file__).resolve().parents[1]

_out: TextIO | None = None
_err: TextIO | None = None
_log: Path | None = None
_display: Console | None = None
NOT_REDIRECTED: dict[str, Any] = {"redirect_stdout": False, "redirect_stderr": False}


def out() -> TextIO:
    """Standard output, for our own lines."""
    return _out or sys.stdout


def err() -> TextIO:
    """Standard error, for our own lines."""
    return _err or sys.stderr


def log_file() -> Path | None:
    """Where the lines of other libraries are; None if there are none, or if they are shown."""
    return _log if _log is not None and _log.exists() and _log.stat().st_size else None


def say(text: str) -> None:
    """Print a line."""
    _print(text, out())


def note(text: str) -> None:
    """Print a line to standard error."""
    _print(text, err())


def warn(text: str) -> None:
    """Print a warning to standard error."""
    note(f"warning: {text}")


def _print(text: str, file: TextIO) -> None:
    with contextlib.suppress(OSError):
        if _display is None:
            print(text, file=file, flush=True)
        else:  # above what is on display
            _display.print(text, markup=False, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def showing(display: Live | Progress) -> Iterator[None]:
    """Show a display that does not redirect `sys.stdout`; our lines go above it."""
    global _display
    with display:
        _display = display.console
        try:
            yield
        finally:
            _display = None


@contextlib.contextmanager
def phase(text: str) -> Iterator[None]:
    """Say what takes long: with a spinner on a terminal, as a line elsewhere."""
    from rich.console import Console
    from rich.live import Live
    from rich.spinner import Spinner

    console = Console(file=err())
    if not console.is_terminal or _display is not None:
        note(text)
        yield
        return
    spinner = Spinner("dots", text=text)
    with showing(Live(spinner, console=console, transient=True, **NOT_REDIRECTED)):
        yield


def keep_for_ours(name: str) -> None:
    """Send everything that this process and its children print, our own lines excepted, to a new
    file of their user alone, until the process ends."""
    global _out, _err, _log
    safe = "".join(letter for letter in name if letter.isalnum())
    handle, path = tempfile.mkstemp(prefix=f"rayward-{safe}-", suffix=".log")
    _log = Path(path)
    ours = [os.fdopen(os.dup(fd), "w", encoding="utf-8", errors="replace") for fd in (1, 2)]
    for fd in (1, 2):
        os.dup2(handle, fd)
    os.close(handle)
    _out, _err = ours
    _show_our_warnings()


def keep_worker_output_for_ours() -> None:
    """On a Ray worker: our lines and warnings are its standard output, all else standard error."""
    global _out, _err
    if _out is None:
        _out = _err = sys.stdout
        sys.stdout = sys.stderr


def drop_log() -> None:
    """Remove the log file of a command that has succeeded."""
    if _log is not None:
        _log.unlink(missing_ok=True)


def _show_our_warnings() -> None:
    handler = logging.StreamHandler(err())
    handler.setFormatter(_Formatter())
    handler.setLevel(logging.WARNING)
    for name in PACKAGES:
        logging.getLogger(name).addHandler(handler)
    others = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], filename: str, *rest: object) -> None:
        if issubclass(category, UserWarning) and any(
            Path(filename).resolve().is_relative_to(_ROOT / name) for name in PACKAGES
        ):
            warn(str(message))
        else:
            others(message, category, filename, *rest)  # type: ignore[arg-type]

    warnings.showwarning = show  # type: ignore[assignment]


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return f"{record.levelname.lower()}: {record.getMessage()}"
