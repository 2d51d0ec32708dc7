"""Directories with weights that are pickles."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.mark),)


def with_pickled_weights(export: Path, directory: Path, mark: Path) -> Path:
    """The export with a pickle in place of its weights."""
    shutil.copytree(export, directory)
    for file in ("model.safetensors", "MANIFEST.json"):
        (directory / file).unlink()
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(mark)))
    return directory
