"""What people see: our own lines. What other libraries print goes to a log file.

A command takes its process over: `out()` and `err()` are then the terminal's, while `sys.stdout`,
`sys.stderr` and the file descriptors 1 and 2, which libraries and child processes write to, lead to
the log. On a Ray worker our lines are its standard output, which the command prints as they come
(`reward_actor.ray_internals.take_worker_lines`), and all else is its standard error. In any other
process, a user's own script for one, nothing is redirected, and nothing is said but what is asked.
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
ROOT = Path(__file__).resolve().parents[1]
"""The directory that holds them."""

NOT_REDIRECTED: dict[str, Any] = {"redirect_stdout": False, "redirect_stderr": False}

_is_command = False
_out: TextIO | None = None
_err: TextIO | None = None
_log: Path | None = None
_log_is_named = False
_display: Console | None = None


def is_command() -> bool:
    """Whether this process is a command of ours."""
    return _is_command


def out() -> TextIO:
    """Standard output, for our own lines."""
    return _out or sys.stdout


def err() -> TextIO:
    """Standard error, for our own lines."""
    return _err or sys.stderr


def put(text: str) -> None:
    """Print a line of a command's result. Raises OSError if it cannot be written."""
    _print(text, out())


def say(text: str) -> None:
    """Print a line of progress. A full disk under a log, or a pipe that is not read any more, must
    not end what runs: a line that cannot be written is lost."""
    with contextlib.suppress(OSError):
        _print(text, out())


def note(text: str) -> None:
    """Print a line of progress to standard error."""
    with contextlib.suppress(OSError):
        _print(text, err())


def warn(text: str) -> None:
    """Print a warning to standard error."""
    note(f"warning: {text}")


def _print(text: str, file: TextIO) -> None:
    if _display is None or not file.isatty():
        print(text, file=file, flush=True)
    else:  # above what is on display, on the same terminal
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
    """Say, in a command, what takes long: with a spinner on a terminal, as a line elsewhere."""
    if not _is_command:
        yield
        return
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


def take_over(name: str, *, verbose: bool = False) -> None:
    """Make this process a command's until it ends. Unless `verbose`, everything that it and its
    children print, our own lines excepted, goes to a new file that its user alone can read."""
    global _is_command
    _is_command = True
    if not verbose:
        try:
            _redirect(name)
        except OSError as error:  # a read-only disk, a closed standard output
            warn(f"there is no log file for the output of libraries: {error}")
    _show_our_warnings()


def _redirect(name: str) -> None:
    global _out, _err, _log
    ours = [os.fdopen(os.dup(fd), "w", encoding="utf-8", errors="replace") for fd in (1, 2)]
    safe = "".join(letter for letter in name if letter.isalnum())
    handle, path = tempfile.mkstemp(prefix=f"rayward-{safe}-", suffix=".log")
    for fd in (1, 2):
        os.dup2(handle, fd)
    os.close(handle)
    _out, _err = ours
    _log = Path(path)


def named_log() -> Path | None:
    """Where the lines of other libraries are, for an error to name, which keeps the file. None if
    there are none, or if they are shown."""
    global _log_is_named
    if _log is None or not _log.exists() or not _log.stat().st_size:
        return None
    _log_is_named = True
    return _log


def drop_log() -> None:
    """Remove the log file if no error has named it."""
    if _log is not None and not _log_is_named:
        _log.unlink(missing_ok=True)


def keep_worker_output_for_ours() -> None:
    """On a Ray worker: our lines and warnings are its standard output, all else standard error."""
    global _out, _err
    if _out is None:
        _out = _err = sys.stdout
        sys.stdout = sys.stderr


def _show_our_warnings() -> None:
    for name in PACKAGES:
        logging.getLogger(name).addHandler(_Notes(logging.WARNING))
    others = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], filename: str, *rest: object) -> None:
        if issubclass(category, UserWarning) and any(
            Path(filename).resolve().is_relative_to(ROOT / name) for name in PACKAGES
        ):
            warn(str(message))
        else:
            others(message, category, filename, *rest)  # type: ignore[arg-type]

    warnings.showwarning = show  # type: ignore[assignment]


class _Notes(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        note(f"{record.levelname.lower()}: {record.getMessage()}")
