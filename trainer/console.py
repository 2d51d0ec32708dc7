"""Lines for people, and the error that ends a training.

A full disk under a log, or a pipe that nobody reads any more, must not end a training, so a line
that cannot be written is lost.
"""

from __future__ import annotations

import contextlib
import sys


class TrainingError(RuntimeError):
    """The training cannot go on; the message says where it stands and why."""


def say(text: str) -> None:
    """Print a line."""
    with contextlib.suppress(OSError):
        print(text, flush=True)


def warn(text: str) -> None:
    """Print a warning to standard error."""
    with contextlib.suppress(OSError):
        print(f"warning: {text}", file=sys.stderr, flush=True)
