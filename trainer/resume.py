"""Checkpoints that can be trusted, and whether a directory holds this run or another one.

A checkpoint is what DeepSpeed saves on every rank, merged by Ray Train into one folder of the run.
Each rank adds a manifest with the size and sha256 of its files. A folder is complete when all
manifests and all their files are there in full; the digests are checked before anything is loaded,
because DeepSpeed reads its files by pickle.

What there is to resume from, and to delete, is read from the folders. Ray Train's own list of them
lags behind a kill or is cut short by it, and Ray refuses to start when it names a missing folder.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reward_actor.contract import sha256_file
from trainer.config import TrainConfig

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

RUN_NAME = "checkpoints"
IDENTITY_FILE = "run.json"
_SNAPSHOT = "checkpoint_manager_snapshot.json"

# Settings that decide what is learned, or how the training state is cut up.
_IDENTITY = ("model", "adapter", "loss", "optimizer", "training", "distributed")
_FREE = ("model.path", "distributed.device", "distributed.cpus_per_worker",
         "distributed.max_failures")  # fmt: skip


@dataclass(frozen=True)
class SavedState:
    """A complete checkpoint: `step` optimizer steps are done."""

    path: Path
    step: int
    num_workers: int
    is_best: bool


def identity(config: TrainConfig, model: str, data: str) -> dict[str, Any]:
    """What must be equal for a checkpoint to be continued; `model` and `data` are fingerprints."""
    settings = config.model_dump(mode="json")
    return {
        **{
            f"{section}.{key}": value
            for section in _IDENTITY
            for key, value in settings[section].items()
            if f"{section}.{key}" not in _FREE
        },
        "the weights at model.path": model,
        "the training pairs": data,
    }


def check_identity(output_dir: Path, current: Mapping[str, Any]) -> None:
    """Claim an empty `output_dir` for this run. Raises ValueError if it holds another one."""
    path = output_dir / IDENTITY_FILE
    if not path.exists():
        output_dir.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps(dict(current), indent=2) + "\n")
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    different = [key for key in sorted({*before, *current}) if before.get(key) != current.get(key)]
    if different:
        shown = [
            f"{key} differ" if key.startswith("the ") else
            f"{key} was {before.get(key)!r}, is now {current.get(key)!r}"
            for key in different
        ]  # fmt: skip
        raise ValueError(
            f"output_dir: {output_dir} holds another run: {'; '.join(shown)}. Put that back to go "
            "on with it, choose another --output-dir, or delete the directory."
        )


def replace_text(path: Path, text: str) -> None:
    """Write a file that is never seen half-written."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def saved_states(run_dir: Path) -> list[SavedState]:
    """The complete checkpoints of a run, newest first, judged by names and sizes of their files."""
    found = []
    for folder in run_dir.glob("checkpoint_*"):
        try:
            manifests = [json.loads(path.read_text()) for path in folder.glob(_manifest_name("*"))]
        except ValueError:  # cut short
            continue
        if not manifests or len(manifests) != manifests[0]["num_workers"]:
            continue
        sizes = {
            name: size for manifest in manifests for name, (_, size) in manifest["files"].items()
        }
        if all(_size(folder / name) == size for name, size in sizes.items()):
            first = manifests[0]
            found.append(
                SavedState(folder, first["step"], first["num_workers"], first.get("is_best", False))
            )
    return sorted(found, key=lambda state: (-state.step, state.path.name))


def tidy(run_dir: Path) -> list[SavedState]:
    """Delete half-written checkpoints before a run goes on; the complete ones, newest first."""
    states = saved_states(run_dir)
    complete = {state.path for state in states}
    for folder in run_dir.glob("checkpoint_*"):
        if folder.is_dir() and folder not in complete:
            shutil.rmtree(folder)
    (run_dir / _SNAPSHOT).unlink(missing_ok=True)
    return states


def save(
    engine: DeepSpeedEngine,
    step: int,
    metrics: Mapping[str, Any],
    run_dir: Path,
    num_to_keep: int,
    is_best: bool = False,
) -> None:
    """Report a checkpoint to Ray Train, on every worker at once, and delete the oldest ones, but
    for the last of those that `is_best`.

    Returns when it is stored.
    """
    import ray.train

    from trainer import zero

    context = ray.train.get_context()
    folder = Path(tempfile.mkdtemp(prefix="rayward-checkpoint-"))
    try:
        zero.save(engine, folder)
        manifest = {
            "step": step,
            "num_workers": context.get_world_size(),
            "is_best": is_best,
            "files": {
                str(path.relative_to(folder)): (sha256_file(path), path.stat().st_size)
                for path in sorted(folder.rglob("*"))
                if path.is_file()
            },
        }
        (folder / _manifest_name(context.get_world_rank())).write_text(json.dumps(manifest))
        checkpoint = ray.train.Checkpoint.from_directory(folder)
        ray.train.report({**metrics, "step": step}, checkpoint=checkpoint)
    finally:
        shutil.rmtree(folder)
    if context.get_world_rank() == 0:
        states = saved_states(run_dir)
        best = next((state for state in states if state.is_best), None)
        for state in states[num_to_keep:]:
            if state is not best:
                shutil.rmtree(state.path)


def restore(engine: DeepSpeedEngine, run_dir: Path, step: int | None = None) -> int:
    """Load the newest checkpoint that is whole on every worker; the number of steps it has done.

    0 without a checkpoint. With `step`, only one of that step will do. A damaged one is passed over
    for the one before it. Raises ValueError if there are checkpoints and all are damaged.
    """
    import torch
    from torch import distributed as dist

    from trainer import zero

    found: list[list[SavedState]] = [saved_states(run_dir) if dist.get_rank() == 0 else []]
    dist.broadcast_object_list(found, src=0, device=engine.device)
    for state in found[0]:
        if step not in (None, state.step):
            continue
        whole = torch.tensor(int(_is_whole(state.path, dist.get_rank())), device=engine.device)
        dist.all_reduce(whole, op=dist.ReduceOp.MIN)
        if whole:
            zero.load(engine, state.path)
            return state.step
    if found[0]:
        raise ValueError(f"every checkpoint in {run_dir} is damaged; delete it to start again")
    return 0


def _is_whole(folder: Path, rank: int) -> bool:
    files = json.loads((folder / _manifest_name(rank)).read_text())["files"]
    return all(sha256_file(folder / name) == sha for name, (sha, _) in files.items())


def _manifest_name(rank: int | str) -> str:
    return f"manifest-rank{rank}.json"


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None
