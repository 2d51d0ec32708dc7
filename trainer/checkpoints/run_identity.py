"""Whether a directory, and the storage of its checkpoints, hold this run or another one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reward_actor.contract import sha256_file, sha256_text
from trainer.checkpoints.storage import Storage, StorageError, checkpoint_storage
from trainer.config.train import TrainConfig

IDENTITY_FILE = "run.json"

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
