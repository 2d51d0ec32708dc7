"""Checkpoints of a training: snapshots, stored in the background, and loaded again.

See `trainer.saved` for what is stored.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed as dist

from trainer import zero
from trainer.errors import TrainingError
from trainer.saved import (
    TAG,
    SavedState,
    fetched,
    is_read_by,
    manifest_name,
    saved_states,
    stored_files,
    tidy,
)
from trainer.storage import StorageError, checkpoint_storage

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

    from trainer.config import TrainConfig

_STAGING = "rayward-checkpoint-"


@dataclass
class _Upload:
    """A checkpoint on its way: what became of this worker's part, None where it was stored."""

    folder: str
    step: int
    outcome: Future[str | None]


class Checkpoints:
    """The checkpoints of a run. Every method is called by all workers at once.

    keep        steps whose checkpoints are not deleted, besides the newest ones
    num_failed  how many could not be stored
    on_stored   called on every worker when a checkpoint is complete in the storage
    """

    def __init__(self, engine: DeepSpeedEngine, config: TrainConfig) -> None:
        self._engine = engine
        self._storage = checkpoint_storage(config)
        self._settings = config.checkpoint
        self._staging = _make_staging()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._in_flight: _Upload | None = None
        self.keep: set[int] = set()
        self.num_failed = 0
        self.on_stored: Callable[[SavedState], None] = lambda _: None

    def save(self, step: int) -> None:
        """Take a snapshot and store it: in the background if `checkpoint.asynchronous`, one at a
        time. A checkpoint that cannot be stored is told and counted, and nothing else."""
        self.wait()
        name = f"checkpoint_{step:08d}_{uuid.uuid4().hex[:8]}"
        folder: str = _from_first(name, self._engine)
        shutil.rmtree(self._staging / TAG, ignore_errors=True)
        with _collected_errors(self._engine) as errors:
            zero.save(self._engine, self._staging)
        outcome = self._thread.submit(
            self._store, folder, step, dist.get_rank(), dist.get_world_size(), errors
        )
        self._in_flight = _Upload(folder, step, outcome)
        if not self._settings.asynchronous:
            self.wait()

    def poll(self) -> None:
        """Settle a checkpoint whose storing has ended. Meant to be called after every step."""
        if self._in_flight is not None:
            done = torch.tensor(int(self._in_flight.outcome.done()), device=self._engine.device)
            dist.all_reduce(done, op=dist.ReduceOp.MIN)
            if done:
                self.wait()

    def wait(self) -> None:
        """Return when no checkpoint is on its way any more."""
        upload, self._in_flight = self._in_flight, None
        if upload is None:
            return
        outcomes: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(outcomes, upload.outcome.result())
        shutil.rmtree(self._staging / TAG, ignore_errors=True)
        problems = [f"rank {rank}: {text}" for rank, text in enumerate(outcomes) if text]
        if problems:
            self.num_failed += 1
            self._say(
                f"the checkpoint of step {upload.step} could not be stored in "
                f"{self._storage.root} ({'; '.join(problems)}); training goes on, and the ones "
                f"before it are untouched. {self.num_failed} failed so far."
            )
            if dist.get_rank() == 0:
                self._try(lambda: self._storage.delete(upload.folder))
            return
        if dist.get_rank() == 0:
            self._try(self._delete_old)
        self.on_stored(
            SavedState(upload.folder, upload.step, dist.get_world_size(), self.num_failed)
        )

    def restore(self, step: int | None = None) -> int:
        """Load the newest checkpoint that is whole on every worker; the steps it has done.

        0 without a checkpoint. A damaged one is passed over for the one before it, loudly. With
        `step` only the one of that step will do: 0, loudly, without it. Raises TrainingError if
        there are checkpoints and all are damaged.
        """
        self.wait()
        found = self.stored()
        wanted = [state for state in found if step in (None, state.step)]
        for number, state in enumerate(wanted):
            with fetched(self._storage, state, self._files(state), self._staging) as (
                place,
                problem,
            ):
                problems: list[Any] = [None] * dist.get_world_size()
                dist.all_gather_object(problems, problem)
                if not any(problems):
                    zero.load(self._engine, place)
                    self.num_failed = max(self.num_failed, state.num_failed)
                    return state.step
            left = wanted[number + 1 :]
            self._say(
                f"the checkpoint of step {state.step} is damaged: "
                f"{'; '.join(sorted({p for p in problems if p}))}. "
                + (f"The one of step {left[0].step} is taken." if left else "There is no other.")
            )
        if step is not None:
            self._say(f"{self._storage.root} has no whole checkpoint of step {step}")
        elif wanted:
            raise TrainingError(
                f"every checkpoint in {self._storage.root} is damaged; delete it to start again"
            )
        return 0

    def stored(self) -> list[SavedState]:
        """The complete checkpoints, newest first. What was left half-written is deleted."""
        found: list[SavedState] = _from_first(
            tidy(self._storage) if dist.get_rank() == 0 else [], self._engine
        )
        return found

    def close(self) -> None:
        """Wait for the last checkpoint, delete those that `keep` no longer names, and clean up."""
        self.wait()
        if dist.get_rank() == 0:
            self._try(self._delete_old)
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
            self._storage.write_json(f"{folder}/{manifest_name(rank)}", manifest)
        except (*StorageError, RuntimeError) as error:  # torch.save raises RuntimeError
            return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        return None

    def _delete_old(self) -> None:
        states = saved_states(self._storage)
        for state in states[self._settings.num_to_keep :]:
            if state.step not in self.keep:
                self._storage.delete(state.folder)

    def _files(self, state: SavedState) -> dict[str, str]:
        """The sha256 of what this worker checks. Files in place are checked by who stored them."""
        rank = dist.get_rank()
        if self._storage.is_local:
            return stored_files(self._storage, state, [rank])
        files = stored_files(self._storage, state, range(state.num_workers))
        return {name: digest for name, digest in files.items() if is_read_by(rank, name)}

    def _try(self, act: Callable[[], None]) -> None:
        """Cleaning up that a storage out of reach may put off."""
        try:
            act()
        except StorageError as error:
            self._say(f"{self._storage.root} cannot be tidied up: {error}")

    def _say(self, text: str) -> None:
        if dist.get_rank() == 0:
            print(f"warning: {text}", file=sys.stderr, flush=True)


def _from_first(value: Any, engine: DeepSpeedEngine) -> Any:
    """What the first worker has, on every worker."""
    shared = [value]
    dist.broadcast_object_list(shared, src=0, device=engine.device)
    return shared[0]


@contextlib.contextmanager
def _collected_errors(engine: DeepSpeedEngine) -> Iterator[list[Exception]]:
    """Errors of DeepSpeed's writer go into a list: a worker that cannot write would otherwise leave
    `save_checkpoint` before the others, who would wait for it at the next barrier for ever."""
    writer = engine.checkpoint_engine
    errors: list[Exception] = []
    write = writer.save

    def save(state_dict: Any, path: str) -> None:
        try:
            write(state_dict, path)
        except (OSError, RuntimeError) as error:
            errors.append(error)

    writer.save = save
    engine._copy_recovery_script = lambda _: None  # a file that nothing here reads
    try:
        yield errors
    finally:
        del writer.save, engine._copy_recovery_script


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
