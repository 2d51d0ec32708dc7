"""The command line: `rayward COMMAND ...`. It imports everything, but only when a command runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Exit codes: 0 done, 1 a check failed or no completion got a reward, 2 wrong
    input, 130 interrupted.

    Without `argv` it is this process's own command, and takes the process over: its terminal is for
    our lines, and the directory that it runs in is no place for imports.
    """
    from rayward.__main__ import run

    if argv is not None:
        return run(argv)

    from rayward import clashes
    from reward_actor import terminal
    from reward_actor.command_line import complain

    clashes.leave_working_directory()
    try:
        clashes.check()
    except ValueError as error:
        return complain(error)
    arguments = sys.argv[1:]
    if "--verbose" not in arguments:
        terminal.keep_for_ours(next(iter(arguments), "help"))
    status = run(arguments)
    if status == 0:
        terminal.drop_log()
    return status
