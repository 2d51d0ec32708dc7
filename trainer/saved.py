"""What is stored of a run's checkpoints: which are complete, which are whole. No torch.

A checkpoint is what DeepSpeed saves on every worker, in one folder of the run's storage. Each
worker stores its files and, after them, a manifest with their sizes and sha256. A folder is
complete when all manifests and all their files are there in full, whatever was killed when; the
digests are checked before anything is loaded, because DeepSpeed reads its files by pickle. They
show damage, not an attack: they lie beside the files, so whoever can write to the storage can
change both, and run code in the training. Guard the storage like the training itself.

What there is to resume from is read from the folders. Ray Train's own list of checkpoints is not
used: it lags behind a kill, and Ray ends a training when a checkpoint cannot be stored.
"""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from trainer.storage import Storage, StorageError

# DeepSpeed's files lie in a folder of this name inside that of the checkpoint.
TAG = "state"


@dataclass(frozen=True)
class SavedState:
    """A complete checkpoint in `folder` of the storage: `step` optimizer steps are done."""

    folder: str
    step: int
    num_workers: int
    num_failed: int
    """Checkpoints of the run that could not be stored before this one."""


def saved_states(storage: Storage) -> list[SavedState]:
    """The complete checkpoints, newest first, judged by the names and sizes of their files."""
    sizes = storage.sizes()
    found = []
    for folder in sorted({name.partition("/")[0] for name in sizes if "/" in name}):
        names = [name for name in sizes if re.fullmatch(f"{folder}/manifest-rank\\d+.json", name)]
        manifests = [storage.read_json(name) for name in names]
        if not manifests or None in manifests or len(manifests) != manifests[0]["num_workers"]:
            continue
        files = {
            name: size for manifest in manifests for name, (_, size) in manifest["files"].items()
        }
        if all(sizes.get(f"{folder}/{name}") == size for name, size in files.items()):
            first = manifests[0]
            found.append(
                SavedState(folder, first["step"], first["num_workers"], first["num_failed"])
            )
    return sorted(found, key=lambda state: state.step, reverse=True)


def tidy(storage: Storage) -> list[SavedState]:
    """Delete what a killed run has left half-written; the complete checkpoints, newest first."""
    states = saved_states(storage)
    complete = {state.folder for state in states}
    for folder in storage.folders():
        if folder.startswith("checkpoint_") and folder not in complete:
            storage.delete(folder)
    return states


def manifest_name(rank: int) -> str:
    return f"manifest-rank{rank}.json"


def stored_files(storage: Storage, state: SavedState, ranks: Iterable[int]) -> dict[str, str]:
    """The sha256 of the files that these workers have stored, by name."""
    manifests = [storage.read_json(f"{state.folder}/{manifest_name(rank)}") for rank in ranks]
    return {
        name: digest for manifest in manifests for name, (digest, _) in manifest["files"].items()
    }


def is_read_by(rank: int, name: str) -> bool:
    """Whether DeepSpeed reads a file on this worker: a shard only on its own, others on all."""
    shard = re.search(r"zero_pp_rank_(\d+)_", name)
    return shard is None or int(shard[1]) == rank


@contextlib.contextmanager
def fetched(
    storage: Storage, state: SavedState, files: Mapping[str, str], staging: Path | None = None
) -> Iterator[tuple[Path, str | None]]:
    """A local folder with these files of a checkpoint, given with their sha256, and what is wrong
    with the first that is damaged. What is not local is brought into `staging` for the while."""
    if storage.is_local:
        place = Path(storage.path(state.folder))
        yield place, _damage(files, lambda name: storage.sha256(f"{state.folder}/{name}"))
        return
    with tempfile.TemporaryDirectory(prefix="rayward-restore-", dir=staging) as folder:
        place = Path(folder)
        yield (
            place,
            _damage(files, lambda name: storage.download(f"{state.folder}/{name}", place / name)),
        )


def _damage(files: Mapping[str, str], digest_of: Callable[[str], str]) -> str | None:
    for name, digest in files.items():
        try:
            if digest_of(name) != digest:
                return f"{name} does not have the sha256 that its manifest says"
        except StorageError as error:
            return f"{name} cannot be read ({error})"
    return None
