"""The whole command line in words, which tests/rayward/command_line.txt freezes.

python tests/helpers/command_lines.py > tests/rayward/command_line.txt
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator

from rayward.__main__ import COMMANDS, make_parser
from reward_actor.command_line import shown


def command_lines() -> str:
    """Every command, with its arguments and their defaults."""
    return "\n\n".join("\n".join(_described(name)) for name in COMMANDS) + "\n"


def _described(name: str) -> Iterator[str]:
    parser = make_parser(name)
    yield parser.prog
    for action in parser._actions:
        names = ", ".join(action.option_strings)
        default = "" if action.default in (None, argparse.SUPPRESS) else shown(action.default)
        help = (action.help or "").replace("%(default)s", str(action.default)).replace("%%", "%")
        bracket = re.search(r" \[(.*)\]$", " " + help)
        told = bracket[1] if bracket else ""
        words = [names or str(action.metavar), str(action.metavar or "") if names else ""]
        words += [f"= {told}" if told else "", f"({default})" if default not in ("", told) else ""]
        yield "  " + " ".join(word for word in words if word)


if __name__ == "__main__":
    print(command_lines(), end="")
