"""The command line: `rayward COMMAND ...`. It imports everything, but only when a command runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code, as `rayward --help` has them. Without `argv` it is this
    process's own command, and takes the process over (`reward_actor.command_line.run_process`)."""
    from rayward.__main__ import run

    if argv is not None:
        return run(argv)
    from reward_actor.command_line import run_process

    return run_process(next(iter(sys.argv[1:]), "help"), run)
