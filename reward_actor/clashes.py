"""Other people's packages and files of the names that ours have, found before they are imported."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from reward_actor.terminal import PACKAGES, ROOT


def leave_working_directory() -> None:
    """Let a command import nothing from the directory that it is run in, which Python may put
    first: a user's trainer.py would be taken for ours. `reward_actor.cluster` does it on workers.
    """
    here = Path.cwd()
    if here != ROOT:
        sys.path[:] = [entry for entry in sys.path if entry and Path(entry) != here]


def check() -> None:
    """Raise ValueError for a package of ours that is somebody else's."""
    for name in PACKAGES:
        if name == "rayward":  # this very distribution
            continue
        try:
            found = version(name)
        except PackageNotFoundError:
            pass
        else:
            raise ValueError(
                f"the package {name} {found} is installed, and Rayward has one of that name: "
                f"pip uninstall {name}, then install rayward again, since they share files"
            )
        spec = find_spec(name)
        place = None if spec is None else spec.origin
        if place is None or not Path(place).resolve().is_relative_to(ROOT / name):
            raise ValueError(
                f"{name} is {place or 'missing'}, but Rayward's is in {ROOT}: rename that file or "
                "take its directory out of PYTHONPATH"
            )
