"""What is stored of a run's checkpoints: which are complete, which are whole. No torch.

A checkpoint is what DeepSpeed saves on every worker, in one folder of the run's storage. Each
worker stores its files and, after them, a manifest with their sizes and sha256, and its own. A
folder is complete when all manifests are there, whatever was killed when; the digests are checked
before anything is loaded, because DeepSpeed reads its files by pickle. They show damage, not an
attack: they lie beside the files, so whoever can write to the storage can change both, and run code
in the training. Guard the storage like the training itself.

What there is to resume from is read from the folders. Ray Train's own list of checkpoints is not
used: it lags behind a kill, and Ray ends a training when a checkpoint cannot be stored.
"""

from __future__ import annotations

import contextlib
import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reward_actor.contract import sha256_text
from trainer.checkpoints.storage import Storage, StorageError, checkpoint_storage
from trainer.config.train import TrainConfig
from trainer.log import LOG_FILE, read_log

# DeepSpeed's files lie in a folder of this name inside that of the checkpoint.
TAG = "state"

_PREFIX = "checkpoint_"
_MANIFEST = re.compile(r"manifest-rank\d+\.json")


@dataclass(frozen=True)
class SavedState:
    """A complete checkpoint in `folder` of the storage: `step` optimizer steps are done."""

    folder: str
    step: int
    num_workers: int
    num_failed: int
    """Checkpoints of the run that could not be stored before this one."""


@dataclass(frozen=True)
class Survey:
    """What a storage holds, by the names and sizes of its files and by the manifests."""

    states: list[SavedState]
    """The complete checkpoints, newest first."""
    damaged: dict[str, str]
    """Folders that were complete once, and what is wrong with them."""
    unfinished: list[str]
    """Folders that a killed run has left half-written or half-deleted."""


@dataclass(frozen=True)
class Problem:
    """Why a checkpoint cannot be loaded: it is damaged, or its storage is out of reach."""

    text: str
    is_damage: bool


def new_folder(step: int, mark: str) -> str:
    """The name of a checkpoint's folder; `mark` tells two of the same step apart."""
    return f"{_PREFIX}{step:08d}_{mark}"


def survey(storage: Storage) -> Survey:
    """What a storage holds, by one listing of it and every manifest: one that is damaged, or names
    a file that is not there in full, makes its folder damaged; too few of them, unfinished.

    Raises StorageError if any of this cannot be read.
    """
    sizes = storage.sizes()
    found = Survey([], {}, [])
    for folder in storage.folders():
        if not folder.startswith(_PREFIX):
            continue
        files = {
            name[len(folder) + 1 :]: size
            for name, size in sizes.items()
            if name.startswith(f"{folder}/")
        }
        try:
            state = saved_state(storage, folder, files)
        except StorageError:  # some of pyarrow's are ValueErrors, too
            raise
        except ValueError as error:
            found.damaged[folder] = str(error)
            continue
        if state is None:
            found.unfinished.append(folder)
        else:
            found.states.append(state)
    found.states.sort(key=lambda state: state.step, reverse=True)
    return found


def saved_state(
    storage: Storage, folder: str, sizes: Mapping[str, int] | None = None
) -> SavedState | None:
    """The checkpoint of one folder, None if it is not complete. `sizes`: of its files, if known.

    Raises ValueError if it is damaged, StorageError if it cannot be read.
    """
    sizes = storage.sizes(folder) if sizes is None else sizes
    names = [name for name in sizes if _MANIFEST.fullmatch(name)]
    manifests = [_read_manifest(storage, f"{folder}/{name}") for name in names]
    if not manifests or len(manifests) != manifests[0]["num_workers"]:
        return None
    expected = {name: size for m in manifests for name, (_, size) in m["files"].items()}
    wrong = [name for name, size in expected.items() if sizes.get(name) != size]
    if wrong:
        raise ValueError(f"{wrong[0]} is missing or was cut short")
    first = manifests[0]
    return SavedState(folder, first["step"], first["num_workers"], first["num_failed"])


def tidy(storage: Storage) -> Survey:
    """Delete what a killed run has left half-written; what is there."""
    found = survey(storage)
    for folder in found.unfinished:
        delete(storage, folder)
    return found


def delete(storage: Storage, folder: str) -> None:
    """Delete a checkpoint. Half of that, and it is no complete one any more."""
    storage.delete_file(f"{folder}/{manifest_name(0)}")
    storage.delete(folder)


def check_not_lost(storage: Storage, log: Path, every_steps: int) -> None:
    """Raise ValueError if a run whose storage holds no checkpoint surely had some."""
    last = max((line["step"] for line in read_log(log)), default=0)
    # The first one was stored, or given up, before the second was begun.
    if last > 2 * every_steps:
        raise ValueError(
            f"{log} has {last} steps, but there is no checkpoint in {storage.root}: is that the "
            "place where they were stored, and is it mounted? Delete output_dir to start again"
        )


def stored_steps(config: TrainConfig) -> int:
    """The steps that the newest checkpoint of a run has done. Raises ValueError if the storage
    cannot be read, or has lost the checkpoints of a run that surely had some."""
    storage = checkpoint_storage(config)
    try:
        found = tidy(storage)
    except StorageError as error:
        raise ValueError(f"the checkpoints in {storage.root} cannot be read: {error}") from error
    if found.states or found.damaged:
        return found.states[0].step if found.states else 0
    check_not_lost(storage, Path(config.output_dir) / LOG_FILE, config.checkpoint.every_steps)
    return 0


def manifest_name(rank: int) -> str:
    """The file in which one worker says what it has stored."""
    return f"manifest-rank{rank}.json"


def write_manifest(storage: Storage, folder: str, rank: int, manifest: Mapping[str, Any]) -> None:
    """Say what one worker has stored: {"step", "num_workers", "num_failed", "files"}, the last as
    {name: (sha256, bytes)}."""
    storage.write_json(
        f"{folder}/{manifest_name(rank)}", {"sha256": _digest(manifest), "manifest": manifest}
    )


def _read_manifest(storage: Storage, name: str) -> dict[str, Any]:
    """Raises ValueError for a damaged one, FileNotFoundError for none."""
    value = storage.read_json(name)
    if value is None:
        raise FileNotFoundError(f"{name} is missing")
    if not isinstance(value, dict) or value.get("sha256") != _digest(value.get("manifest")):
        raise ValueError(f"{name} does not have its own sha256")
    manifest: dict[str, Any] = value["manifest"]
    return manifest


def _digest(manifest: Any) -> str:
    return sha256_text(json.dumps(manifest, sort_keys=True))


def is_read_by(rank: int, name: str) -> bool:
    """Whether DeepSpeed reads a file on this worker: a shard only on its own, others on all."""
    shard = re.search(r"zero_pp_rank_(\d+)_", name)
    return shard is None or int(shard[1]) == rank


@contextlib.contextmanager
def fetched(
    storage: Storage, state: SavedState, rank: int | None = None, staging: Path | None = None
) -> Iterator[tuple[Path, Problem | None]]:
    """A local folder with what a worker reads of a checkpoint (with no rank: with everything), its
    digests checked, and what is wrong. What is not local is brought into `staging` for the while.
    """
    everyone = range(state.num_workers)
    if storage.is_local:  # in place, where every worker checks what it has stored itself
        mine = everyone if rank is None else [rank]
        yield Path(storage.path(state.folder)), _problem(storage, state, mine, rank, None)
        return
    with tempfile.TemporaryDirectory(prefix="rayward-restore-", dir=staging) as folder:
        yield Path(folder), _problem(storage, state, everyone, rank, Path(folder))


def _problem(
    storage: Storage, state: SavedState, ranks: Iterable[int], reader: int | None, to: Path | None
) -> Problem | None:
    name = state.folder
    try:
        for rank in ranks:
            manifest = _read_manifest(storage, f"{state.folder}/{manifest_name(rank)}")
            for name, (digest, _) in manifest["files"].items():
                where = f"{state.folder}/{name}"
                if to is None:
                    found = storage.sha256(where)
                elif reader is None or is_read_by(reader, name):
                    found = storage.download(where, to / name)
                else:
                    continue
                if found != digest:
                    return Problem(f"{name} does not have the sha256 of its manifest", True)
    except FileNotFoundError:  # the survey has just seen it
        text = f"{name} is missing here: is this storage that every node can reach?"
        return Problem(text, False)
    except StorageError as error:
        return Problem(f"{name} cannot be read: {error}", False)
    except ValueError as error:
        return Problem(str(error), True)
    return None
