"""Checkpoints of a training: snapshots, stored in the background, and loaded again.

See `trainer.checkpoints.manifest` for what is stored.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import distributed as dist

from reward_actor.terminal import warn
from trainer.checkpoints import elastic
from trainer.checkpoints.manifest import (
    TAG,
    Problem,
    SavedState,
    Survey,
    check_not_lost,
    delete,
    fetched,
    new_folder,
    saved_state,
    tidy,
    write_manifest,
)
from trainer.checkpoints.storage import StorageError, checkpoint_storage
from trainer.deepspeed_internals import write_errors
from trainer.errors import TrainingError
from trainer.log import LOG_FILE
from trainer.network import zero
from trainer.network.collectives import from_all, from_first, is_first, wait_until

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

    from trainer.config.train import TrainConfig

_STAGING = "rayward-checkpoint-"


@dataclass
class _Upload:
    """A checkpoint on its way: what became of this worker's part, None where it was stored."""

    folder: str
    step: int
    is_best: bool
    outcome: Future[str | None]


class Checkpoints:
    """The checkpoints of a run. Every method is called by all workers at once.

    states      those that are stored
    best        the step of the best one that is stored; it is not deleted (see `prefer`)
    also_keep   steps whose checkpoints are not deleted either
    num_failed  how many could not be stored
    on_settled  called on every worker when one is in the storage, or could not be stored (None)
    """

    def __init__(self, engine: DeepSpeedEngine, config: TrainConfig) -> None:
        self._engine = engine
        self._storage = checkpoint_storage(config)
        self._config = config
        self._staging = _make_staging()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._in_flight: _Upload | None = None
        self._preferred: int | None = None
        self.states: list[SavedState] = []
        self.best: int | None = None
        self.also_keep: set[int] = set()
        self.num_failed = 0
        self.on_settled: Callable[[int, SavedState | None], None] = lambda *_: None

    def save(self, step: int) -> None:
        """Take a snapshot and store it: in the background if `checkpoint.asynchronous`, one at a
        time. A checkpoint that cannot be stored is told and counted, and nothing else."""
        self.wait()
        folder = from_first(new_folder(step, uuid.uuid4().hex[:8]))
        shutil.rmtree(self._staging / TAG, ignore_errors=True)
        with write_errors(self._engine) as errors:
            zero.save(self._engine, self._staging, TAG)
        outcome = self._thread.submit(
            self._store, folder, step, dist.get_rank(), dist.get_world_size(), errors
        )
        self._in_flight = _Upload(folder, step, step == self._preferred, outcome)
        if not self._config.checkpoint.asynchronous:
            self.wait()

    def prefer(self, step: int) -> None:
        """Make the checkpoint of this step the best one: now if it is stored, else once it is, if
        it is saved after this; until then the best one before it is kept."""
        self._preferred = step
        if any(state.step == step for state in self.states):
            self.best = step

    def poll(self) -> bool:
        """Settle a checkpoint whose storing has ended; whether none is on its way any more. Meant
        to be called after every step."""
        upload = self._in_flight
        if upload is None:
            return True
        done = torch.tensor(int(upload.outcome.done()), device=self._engine.device)
        dist.all_reduce(done, op=dist.ReduceOp.MIN)
        if not done:
            return False
        self._in_flight = None
        self._settle(upload)
        return True

    def wait(self) -> None:
        """Return when no checkpoint is on its way any more."""
        wait_until(self.poll)

    def _settle(self, upload: _Upload) -> None:
        outcomes = from_all(upload.outcome.result())
        shutil.rmtree(self._staging / TAG, ignore_errors=True)
        problem = "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(outcomes) if text)
        state = None
        if not problem:
            state, problem = from_first(self._look_at(upload.folder) if is_first() else (None, ""))
        if state is None:
            self.num_failed += 1
            self._warn(
                f"the checkpoint of step {upload.step} could not be stored in "
                f"{self._storage.root} ({problem}); training goes on, and the ones before it are "
                f"untouched. {self.num_failed} failed so far."
            )
            if is_first():
                self._try(partial(delete, self._storage, upload.folder))
        else:
            self.states.append(state)
            if upload.is_best:
                self.best = upload.step
            self._delete_old()
        self.on_settled(upload.step, state)

    def _look_at(self, folder: str) -> tuple[SavedState | None, str]:
        """A checkpoint that every worker has stored, or why it is not there in full."""
        try:
            state = saved_state(self._storage, folder)
        except (*StorageError, ValueError) as error:
            return None, f"it cannot be read again: {error}"
        if state is None:
            return None, "what other workers have stored is not there: do all nodes share it?"
        return state, ""

    def restore(self, step: int | None = None) -> int:
        """Load the newest checkpoint that is whole on every worker; the steps it has done.

        0 without a checkpoint. A damaged one is passed over for the one before it, loudly, and then
        deleted. With `step` only the one of that step will do: 0, loudly, without it. Raises
        TrainingError if there are checkpoints and all are damaged, OSError if the storage cannot be
        read, and ValueError if it is empty although the run must have stored some.
        """
        self.wait()
        found = self.stored()
        damaged = dict(found.damaged)
        chosen: SavedState | None = None
        for state in found.states:
            if step not in (None, state.step):
                continue
            with self._fetched(state) as (place, problem):
                problems = {rank: one for rank, one in enumerate(from_all(problem)) if one}
                unreadable = [
                    f"rank {rank}: {one.text}"
                    for rank, one in problems.items()
                    if not one.is_damage
                ]
                if unreadable:
                    raise OSError(f"{self._storage.root}: {state.folder}: {unreadable[0]}")
                if not problems:
                    is_other = state.num_workers != dist.get_world_size()
                    zero.load(
                        self._engine,
                        place,
                        TAG,
                        universal=is_other and zero.is_sharded(self._engine),
                    )
                    chosen = state
                    break
            damaged[state.folder] = "; ".join(sorted({one.text for one in problems.values()}))
        if damaged:
            then = "There is no other"
            if chosen is not None:
                then = f"That of step {chosen.step} is taken, they are deleted"
            self._warn(
                "damaged checkpoints: "
                + "; ".join(f"{folder} ({text})" for folder, text in sorted(damaged.items()))
                + f". {then}."
            )
        if chosen is not None:
            self.num_failed = max(self.num_failed, chosen.num_failed)
            self.states = [state for state in self.states if state.folder not in damaged]
            for folder in damaged if is_first() else ():
                self._try(partial(delete, self._storage, folder))
            return chosen.step
        if step is not None:
            self._warn(f"{self._storage.root} has no whole checkpoint of step {step}")
        elif damaged:
            raise TrainingError(
                f"every checkpoint in {self._storage.root} is damaged; delete it to start again"
            )
        else:  # also after a restart that the command which began the run knows nothing of
            log = Path(self._config.output_dir) / LOG_FILE
            check_not_lost(self._storage, log, self._config.checkpoint.every_steps)
        return 0

    def _fetched(
        self, state: SavedState
    ) -> contextlib.AbstractContextManager[tuple[Path, Problem | None]]:
        """What this worker loads. Raises TrainingError for a checkpoint of another number of
        workers that cannot be cut up anew."""
        workers = dist.get_world_size()
        if state.num_workers == workers:
            return fetched(self._storage, state, dist.get_rank(), self._staging)
        fault = self._config.tied_to_workers
        if fault is not None:
            raise TrainingError(
                f"the checkpoint of step {state.step} is of {state.num_workers} workers, and "
                f"{workers} cannot go on from it: {fault}. Set distributed.num_workers "
                f"{state.num_workers}"
            )
        return elastic.reshaped(self._storage, state, zero.is_sharded(self._engine), self._staging)

    def stored(self) -> Survey:
        """What is in the storage. What was left half-written is deleted."""
        found = from_first(tidy(self._storage) if is_first() else Survey([], {}, []))
        self.states = list(found.states)
        return found

    def close(self) -> None:
        """Wait for the last checkpoint, delete those that need not be kept, and clean up."""
        self.wait()
        self._delete_old()
        self._thread.shutdown()
        shutil.rmtree(self._staging)

    def _store(
        self, folder: str, step: int, rank: int, num_workers: int, errors: list[Exception]
    ) -> str | None:
        """Store this worker's files and then its manifest; why it could not, or None."""
        try:
            if errors:
                raise errors[0]
            files = {}
            for path in sorted((self._staging / TAG).rglob("*")):
                if path.is_file():
                    name = path.relative_to(self._staging).as_posix()
                    digest = self._storage.upload(path, f"{folder}/{name}")
                    files[name] = (digest, path.stat().st_size)
            manifest = {
                "step": step,
                "num_workers": num_workers,
                "num_failed": self.num_failed,
                "files": files,
            }
            write_manifest(self._storage, folder, rank, manifest)
        except (*StorageError, RuntimeError) as error:  # torch.save raises RuntimeError
            return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        return None

    def _delete_old(self) -> None:
        """All but the newest. One that cannot be deleted stays in the list, for the next time."""
        newest = sorted(self.states, key=lambda state: state.step, reverse=True)
        for state in newest[self._config.checkpoint.num_to_keep :] if is_first() else ():
            if state.step != self.best and state.step not in self.also_keep:
                if not self._try(partial(delete, self._storage, state.folder)):
                    break
                self.states.remove(state)
        self.states = from_first(self.states)

    def _try(self, act: Callable[[], object]) -> bool:
        """Cleaning up that a storage out of reach may put off; whether it is done."""
        try:
            act()
        except StorageError as error:
            self._warn(f"{self._storage.root} cannot be tidied up: {error}")
            return False
        return True

    def _warn(self, text: str) -> None:
        if is_first():
            warn(text)


def _make_staging() -> Path:
    """A temporary folder that is locked while this process lives; those of killed ones go."""
    root = Path(tempfile.gettempdir())
    for left in root.glob(f"{_STAGING}*"):
        with contextlib.suppress(OSError), (left / ".lock").open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left)
    new = Path(tempfile.mkdtemp(prefix=f".{_STAGING}"))
    descriptor = os.open(new / ".lock", os.O_RDWR | os.O_CREAT)  # open as long as the process
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    return new.rename(root / f"{new.name.lstrip('.')}-{time.time_ns()}")
