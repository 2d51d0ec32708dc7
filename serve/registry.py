"""Reward models by name, in one directory: `ROOT/NAME` is an export, or holds one as `export`."""

from __future__ import annotations

import os
import re
from pathlib import Path

# A name is one component of a path and looks like nothing else: no separator, no leading dot.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class Registry:
    """The models below a directory. A name never leads out of it, nor does a link."""

    def __init__(self, root: str | Path) -> None:
        """Raises ValueError where there is no such directory."""
        self.root = Path(root).expanduser().resolve()
        if not self.root.is_dir():
            raise ValueError(f"the registry {root} is not a directory")

    def names(self) -> list[str]:
        found = []
        for entry in sorted(self.root.iterdir()):
            try:
                self.directory(entry.name)
            except ValueError:
                continue
            found.append(entry.name)
        return found

    def name_of(self, directory: Path) -> str | None:
        """The name that it has here, if any."""
        return next((name for name in self.names() if self.directory(name) == directory), None)

    def directory(self, name: str) -> Path:
        """The directory of the model. Raises ValueError for what is no name, or nobody's."""
        if not _NAME.fullmatch(name):
            raise ValueError(
                "a model's name has letters, digits, '.', '_' and '-' and begins with a letter or "
                "a digit; paths and addresses are not names"
            )
        place = self.root / name
        if (place / "export").is_dir():
            place = place / "export"
        found = Path(os.path.realpath(place))  # unlike resolve(), no fault for a link in a circle
        is_model = any((found / file).is_file() for file in ("config.json", "ensemble.json"))
        if not found.is_relative_to(self.root) or not is_model:
            raise ValueError("the registry has no model of that name")
        return found
