"""`rayward train --config FILE [--section.key value ...]`, as `python -m trainer`."""

from __future__ import annotations

from collections.abc import Sequence

NAME = "train"
HELP = "train a reward model from preferences and export it"


def run_with(arguments: Sequence[str]) -> int:
    """With the options of `trainer.config.options`, which parses them itself."""
    from trainer.__main__ import main

    return main(arguments, prog="rayward train")
