"""`rayward token NAME`."""

from __future__ import annotations

import argparse
from pathlib import Path

from reward_actor.command_line import Flag
from reward_actor.terminal import note, put

NAME = "token"
HELP = "make a token for callers of the service"
EXTRA = None  # the core is enough


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="who will use it")
    parser.add_argument(
        "--file",
        metavar="FILE",
        required=True,
        help="token file of `rayward serve`; made if missing [required]",
    )
    parser.add_argument(
        "--scopes",
        metavar="SCOPES",
        default="score",
        help="score, admin or score,admin [%(default)s]",
    )
    parser.add_argument(
        "--replace",
        action=Flag,
        default=False,
        help="end the tokens that NAME has so far at once [off]",
    )


def run(arguments: argparse.Namespace) -> int:
    from serve.http.tokens import add_token

    scopes = [scope.strip() for scope in arguments.scopes.split(",")]
    made = add_token(Path(arguments.file), arguments.name, scopes, replace=arguments.replace)
    put(made)
    note(f"scopes {', '.join(scopes)}; {arguments.file} holds its digest only")
    return 0
