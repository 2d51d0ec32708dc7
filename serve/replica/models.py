"""The models that a replica holds: the current one and, for a while, the one before. No Ray.

A hot swap has two steps, so that no request meets a replica without its model: every replica
`prepare`s the candidate beside what it serves, and only when all have done so they `activate` it.
What was current before stays for requests that were rendered for it, until it is retired.

Asleep, a replica holds the current model alone, and that in host memory, or in its directory only.
"""

from __future__ import annotations

import logging
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from reward_actor.info import Described, model_info
from reward_actor.model.tokenizer import identity

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from reward_actor.schema import ModelInfo

    Scores = NDArray[np.float32]

Sequences = Sequence[Any]

logger = logging.getLogger("ray.serve")


class Scorer(Described, Protocol):
    """What a replica needs of an engine."""

    @property
    def max_batch_tokens(self) -> int: ...
    @property
    def num_cache_misses(self) -> int | None: ...
    @property
    def tokenizer_path(self) -> Path: ...

    def plan(self, sequences: Sequences) -> Any: ...
    def raw_scores(self, sequences: Sequences, plan: Any = None) -> Scores: ...
    def token_scores(self, sequences: Sequences, plan: Any = None) -> list[Scores]: ...
    def check(self) -> None:
        """Raises EngineDied if it can score no more."""

    def offload(self) -> bool:
        """Move the weights to host memory until `restore`; False where that would free nothing."""

    def restore(self) -> None:
        """Move them back and replay the golden samples. Raises ValueError and RuntimeError."""

    def close(self) -> None:
        """Give back what it holds; it scores no more."""


@dataclass(frozen=True)
class Scoring:
    """Work of the batcher: (n, K) raw scores of sequences, or n arrays (tokens, K), the raw scores
    of their every token."""

    scorer: Scorer
    token_scores: bool = False

    def prepare(self, sequences: Sequences) -> tuple[Sequences, Any]:
        return sequences, self.scorer.plan(sequences)

    def run(self, prepared: tuple[Sequences, Any]) -> tuple[Scores | list[Scores], float]:
        if self.token_scores:
            return self.scorer.token_scores(*prepared), 1.0
        before = self.scorer.num_cache_misses
        scores = self.scorer.raw_scores(*prepared)
        after = self.scorer.num_cache_misses
        if before is None or after is None:
            return scores, 1.0
        return scores, (after - before) / max(1, len(scores))


Stamp = frozenset[tuple[str, int, int]]
"""The names, sizes and times of change (ns) of a directory's files."""


def _stamp(directory: str) -> Stamp:
    files = [(path, path.stat()) for path in Path(directory).rglob("*") if path.is_file()]
    return frozenset((str(path), stat.st_size, stat.st_mtime_ns) for path, stat in files)


@dataclass(frozen=True, eq=False)
class Loaded:
    """One model, immutable: a batch takes it once and nothing changes it meanwhile.

    stamp: what the directory's files looked like when it was read. tokenizer: what `identity` says
    of it, which takes a while to find.
    """

    directory: str
    stamp: Stamp
    scorer: Scorer
    tokenizer: str
    info: ModelInfo

    @classmethod
    def load(cls, directory: str, load: Callable[[str], Scorer]) -> Loaded:
        """Raises ValueError as `load` does."""
        stamp = _stamp(directory)
        scorer = load(directory)
        print(f"{directory}: path {scorer.path}, {scorer.dtype}", flush=True)  # the replica's log
        return cls(
            directory,
            stamp,
            scorer,
            identity(scorer.renderer.tokenizer),
            model_info(scorer),
        )

    @property
    def version(self) -> str:
        return self.scorer.model_version


class LoadedModels:
    """The current model with its generation and name, a candidate, and what is not retired yet.

    What is let go is closed. All but `find` and `activate` take turns, and as long as a model takes
    to load or to close. While `is_asleep`, neither of the two is to be called, nor is `current`.
    """

    def __init__(
        self,
        directory: str,
        generation: int,
        name: str,
        load: Callable[[str], Scorer],
        retire_after_s: float,
        asleep_as: str | None = None,
    ) -> None:
        """asleep_as: the version that `wake` has to find in the directory ("" for any); None: load
        it now. Raises ValueError as `load` does."""
        self.is_asleep = asleep_as is not None
        self.directory = directory
        self._version = asleep_as or ""
        self._current = None if self.is_asleep else Loaded.load(directory, load)
        self.generation = generation
        self.name = name
        self._load = load
        self._retire_after_s = retire_after_s
        self._candidate: Loaded | None = None
        self._previous: Loaded | None = None
        self._previous_until = 0.0
        self._turn = threading.Lock()

    @property
    def current(self) -> Loaded:
        assert self._current is not None, "its weights were given back"
        return self._current

    def check(self) -> None:
        """Raises EngineDied if the current model can score no more, or never after a wake."""
        if (current := self._current) is not None:
            current.scorer.check()

    def find(self, version: str) -> Loaded | None:
        """The model of this version, if it is loaded."""
        for loaded in (self.current, self._previous):
            if loaded is not None and loaded.version == version:
                return loaded
        return None

    def prepare(self, directory: str) -> Loaded:
        """Load a candidate beside the current model, or find it among what is loaded.

        There are never more than two: the model before the current one has to go first. Raises
        ValueError.
        """
        with self._turn:
            if self.is_asleep:
                raise ValueError("the service sleeps; wake it first")
            self._drop_candidate()
            stamp = _stamp(directory)
            for loaded in (self.current, self._previous):
                if loaded is not None and (loaded.directory, loaded.stamp) == (directory, stamp):
                    self._candidate = loaded
                    return loaded
            self._drop_previous()
            self._candidate = Loaded.load(directory, self._load)
            return self._candidate

    def activate(self, version: str, generation: int, name: str) -> bool:
        """Make the candidate current; False if it is another than this one."""
        if self.is_asleep:
            return False
        if self.generation >= generation:
            return self.current.version == version
        if self._candidate is None or self._candidate.version != version:
            return False
        if self._candidate is not self.current:
            self._previous, self._current = self.current, self._candidate
            self.directory = self._current.directory
            self._previous_until = time.monotonic() + self._retire_after_s
        self.generation, self.name, self._candidate = generation, name, None
        return True

    def discard_candidate(self) -> None:
        with self._turn:
            self._drop_candidate()

    def retire(self) -> None:
        """Let the model before go, if its time is over."""
        with self._turn:
            if time.monotonic() > self._previous_until and self._previous is not self._candidate:
                self._drop_previous()

    def sleep(self) -> None:
        """Give all memory back that the models take on their device. Nothing may be scored then.

        What cannot be moved to host memory is dropped, and read again by `wake`."""
        from reward_actor.engine.memory import give_back

        with self._turn:
            if self.is_asleep:
                return
            self._drop_candidate()
            self._drop_previous()
            try:
                is_offloaded = self.current.scorer.offload()
            except (MemoryError, RuntimeError) as error:
                logger.warning("the weights are not kept in host memory: %s", repr(error))
                is_offloaded = False
            self.is_asleep = True
            if not is_offloaded:
                self._drop_current()
            give_back()

    def wake(self) -> None:
        """Hold the current model again, its golden samples replayed.

        Raises ValueError where they are not reproduced, where the directory is another model's by
        now and as `load` does, RuntimeError and MemoryError; it sleeps on then, and the next `wake`
        reads the directory.
        """
        from reward_actor.engine.memory import give_back

        with self._turn:
            if not self.is_asleep:
                return
            try:
                if self._current is None:
                    self._current = self._read_again()
                else:
                    self._current.scorer.restore()
            except BaseException as error:
                traceback.clear_frames(error.__traceback__)  # they refer to the weights
                self._drop_current()
                raise
            finally:
                give_back()
            self.is_asleep = False

    def _read_again(self) -> Loaded:
        loaded = Loaded.load(self.directory, self._load)
        if self._version in ("", loaded.version):
            return loaded
        loaded.scorer.close()
        raise ValueError(
            f"{self.directory} has changed since the service fell asleep: it was {self._version} "
            f"and is {loaded.version}. Put its files back, or start the service again"
        )

    def _drop_current(self) -> None:
        current, self._current = self._current, None
        if current is not None:
            self._version = current.version
            current.scorer.close()

    def _drop_candidate(self) -> None:
        candidate, self._candidate = self._candidate, None
        if candidate is not None and candidate not in (self._current, self._previous):
            candidate.scorer.close()

    def _drop_previous(self) -> None:
        previous, self._previous = self._previous, None
        if previous is not None:
            previous.scorer.close()
