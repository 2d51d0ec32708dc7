"""MANIFEST.json: the digests by which a damaged or edited directory is told."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from reward_actor.contract import sha256_file
from reward_actor.json_files import json_object
from reward_actor.model.directory import CheckpointError as CheckpointError

MANIFEST_FILE = "MANIFEST.json"


def check_manifest(directory: Path) -> None:
    """Raise CheckpointError if a file differs from the digest that the export recorded.

    Files about the model, which decide no reward, may be left out of a copy.
    """
    path = directory / MANIFEST_FILE
    if not path.exists():
        return
    manifest = json_object(path, CheckpointError)
    for name, expected in manifest["sha256"].items():
        file = directory / name
        if not file.exists():
            if name in manifest.get("optional", []):
                continue
            raise CheckpointError(f"{file} is in {MANIFEST_FILE} but not in the directory")
        if sha256_file(file) != expected:
            raise CheckpointError(
                f"{file} differs from its digest in {MANIFEST_FILE}: it was damaged or edited "
                "after the export. Copy or export it again."
            )


def write_manifest(directory: Path, optional: Iterable[str] = ()) -> None:
    """Record the sha256 of every file of the directory in MANIFEST.json, and which of them a copy
    may lack."""
    files: dict[str, Any] = {
        str(path.relative_to(directory)): sha256_file(path)
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != MANIFEST_FILE
    }
    text = json.dumps({"sha256": files, "optional": sorted(optional)}, indent=2)
    (directory / MANIFEST_FILE).write_text(text + "\n", encoding="utf-8")
