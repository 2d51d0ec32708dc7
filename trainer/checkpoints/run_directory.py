"""The output directory of a run: in use by one training at a time, and what it holds in the end."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from reward_actor.json_files import json_object

RESULT_FILE = "result.json"
EXPORT_DIR = "export"


@contextmanager
def locked(output_dir: Path) -> Iterator[None]:
    """Held while a process trains into a directory. Raises ValueError if another one does."""
    with (output_dir / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"output_dir: {output_dir} is in use by another training") from None
        yield


def finished(output_dir: Path) -> dict[str, Any] | None:
    """The result of a run whose export is there and whole, else None."""
    from reward_actor.model.directory import CheckpointError
    from reward_actor.model.manifest import check_manifest

    path, export_dir = output_dir / RESULT_FILE, output_dir / EXPORT_DIR
    if not path.exists() or not (export_dir / "MANIFEST.json").exists():
        return None
    try:
        check_manifest(export_dir)
    except CheckpointError:
        return None  # it is written again from the last checkpoint
    return json_object(path)
