"""The command line: `rayward COMMAND ...`. It imports everything, but only when a command runs."""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Exit codes: 0 done, 1 a check failed, 2 wrong input, 130 interrupted."""
    from rayward.__main__ import run

    return run(argv)
