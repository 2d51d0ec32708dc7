"""Whether a directory, and the storage of its checkpoints, hold this run or another one; whether it
is in use, or finished."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from reward_actor.contract import sha256_file, sha256_text
from reward_actor.json_files import json_object
from trainer.checkpoints.storage import Storage, StorageError, checkpoint_storage
from trainer.config.train import TrainConfig

IDENTITY_FILE = "run.json"
RESULT_FILE = "result.json"
EXPORT_DIR = "export"

# Settings that decide what is learned, or how the training state is cut up.
_IDENTITY = ("model", "adapter", "loss", "optimizer", "training", "distributed")
_FREE = ("model.path", "distributed.num_workers", "distributed.min_workers", "distributed.device",
         "distributed.cpus_per_worker", "distributed.max_failures")  # fmt: skip


def identity(config: TrainConfig, data: str) -> dict[str, Any]:
    """What must be equal for a checkpoint to be continued; `data` is a fingerprint."""
    settings = config.model_dump(mode="json")
    return {
        **{
            f"{section}.{key}": value
            for section in _IDENTITY
            for key, value in settings[section].items()
            if f"{section}.{key}" not in _FREE
        },
        "the weights at model.path": _model_digest(config.model.directory),
        "the training pairs": data,
    }


def _model_digest(name: str) -> str:
    """Tells two base models apart without reading gigabytes: the configuration, names and sizes."""
    directory = Path(name)
    if not directory.is_dir():
        return name
    sizes = sorted((p.name, p.stat().st_size) for p in directory.glob("*.safetensors"))
    return sha256_text(f"{sha256_file(directory / 'config.json')} {sizes}")


def _defaults(config: TrainConfig) -> dict[str, Any]:
    """What settings were that did not exist yet when a run was begun."""
    return {
        f"{section}.{key}": value
        for section in _IDENTITY
        for key, value in type(getattr(config, section))
        .model_construct()
        .model_dump(mode="json", warnings=False)
        .items()
    }


def check_identity(config: TrainConfig, current: Mapping[str, Any]) -> None:
    """Claim `output_dir` and the storage of the checkpoints for this run, where they are empty.

    Raises ValueError if one of them holds another run, or the storage cannot be used.
    """
    defaults = _defaults(config)
    _claim("output_dir", Storage.at(config.output_dir), current, defaults)
    if config.checkpoint.storage_path is not None:
        _claim("checkpoint.storage_path", checkpoint_storage(config), current, defaults)


def _claim(
    setting: str, place: Storage, current: Mapping[str, Any], defaults: Mapping[str, Any]
) -> None:
    try:
        before = place.read_json(IDENTITY_FILE)
        if before is None:
            place.make()
            place.write_json(IDENTITY_FILE, dict(current))
            return
    except StorageError as error:
        raise ValueError(f"{setting}: {place.root} cannot be used: {error}") from error
    except ValueError as error:
        raise ValueError(f"{setting}: {error}: nobody can tell which run this is") from None
    before = {**{key: defaults[key] for key in current.keys() & defaults.keys()}, **before}
    different = [key for key in sorted({*before, *current}) if before.get(key) != current.get(key)]
    if different:
        shown = [
            f"{key} differ" if key.startswith("the ") else
            f"{key} was {before.get(key)!r}, is now {current.get(key)!r}"
            for key in different
        ]  # fmt: skip
        raise ValueError(
            f"{setting}: {place.root} holds another run: {'; '.join(shown)}. Put that back to go "
            "on with it, choose another --output-dir, or delete the directory."
        )


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
