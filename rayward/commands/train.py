"""`rayward train --config FILE [--section.key value ...]`, as `python -m trainer`."""

from __future__ import annotations

import argparse

NAME = "train"
HELP = "train a reward model from preferences and export it"
EXTRA = "train"


def add_options(parser: argparse.ArgumentParser) -> None:
    from trainer.__main__ import DESCRIPTION, add_options

    parser.description = DESCRIPTION
    add_options(parser)


def run(arguments: argparse.Namespace) -> int:
    from trainer.__main__ import run

    return run(arguments)
