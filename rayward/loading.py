"""The options of commands that load a reward model, or call a service that has loaded one."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

from reward_actor.command_line import Flag, option

LOADING = ("device", "dtype", "attention", "trust_remote_code")


def add_loading(parser: argparse.ArgumentParser) -> None:
    """Options that are absent unless they are given: a service that has its model refuses them."""
    for name, metavar, help in (
        ("--device", "DEVICE", "auto, cpu, cuda, cuda:1, ... [auto]"),
        ("--dtype", "DTYPE", "auto (the contract's), float32, bfloat16, float16 [auto]"),
        ("--attention", "PATH", "auto (the fastest exact path), forest, padded [auto]"),
    ):
        parser.add_argument(name, metavar=metavar, default=argparse.SUPPRESS, help=help)
    parser.add_argument(
        "--trust-remote-code",
        action=Flag,
        default=argparse.SUPPRESS,
        help="run Python code found in the model [off]",
    )


def loading_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What was given of `add_loading`'s options, as `RewardScorer.from_pretrained` takes it.

    Raises ValueError if the model is a service's.
    """
    given = chosen(arguments, LOADING)
    if given and is_url(arguments.model):
        raise ValueError(
            f"{as_options(given)}: these are for loading a model, and the service at "
            f"{arguments.model} has loaded its own; give them to `rayward serve`"
        )
    return given


def chosen(arguments: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """Those of the options with a default of SUPPRESS that were given."""
    return {name: getattr(arguments, name) for name in names if name in arguments}


def as_options(names: Iterable[str]) -> str:
    """Names of settings as they are typed."""
    return ", ".join(map(option, names))


def is_url(model: str) -> bool:
    return model.startswith(("http://", "https://"))
