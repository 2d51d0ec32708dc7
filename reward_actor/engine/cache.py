"""An exact cache of raw scores: the same token ids under the same model version, the same answer.

Neither torch nor ray. Legend: n sequences, K heads.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Scores = NDArray[np.float32]

Key = tuple[str, bytes]
"""The model version and the digest of the ids."""


def cache_key(model_version: str, ids: Sequence[int]) -> Key:
    """sha256 over the number of ids and their int32 bytes: equal keys are equal sequences."""
    digest = hashlib.sha256(len(ids).to_bytes(8, "little"))
    digest.update(np.asarray(ids, dtype="<i4").tobytes())
    return model_version, digest.digest()


class RewardCache:
    """The raw scores of the `max_entries` sequences that were asked for last. Thread-safe.

    `num_hits` and `num_misses` count each distinct sequence of a call once.
    """

    def __init__(self, max_entries: int) -> None:
        if max_entries < 1:
            raise ValueError(f"max_entries is {max_entries}; it must be at least 1")
        self.max_entries = max_entries
        self.num_hits = 0
        self.num_misses = 0
        # Bytes, not arrays: an array's own header is four times what it holds here.
        self._entries: OrderedDict[Key, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def scores(
        self,
        model_version: str,
        sequences: Sequence[Sequence[int]],
        compute: Callable[[list[Sequence[int]]], Scores],
    ) -> Scores:
        """(n, K) scores; `compute` gets those that are not known, each once, and gives (m, K).

        It runs outside the lock: two threads may compute the same sequence, and the later one's
        scores stay. Scores that are not finite are not kept.
        """
        if not sequences:
            return compute([])
        keys = [cache_key(model_version, ids) for ids in sequences]
        found = self._known(keys)
        missing = {k: ids for k, ids in zip(keys, sequences, strict=True) if k not in found}
        if missing:
            rows = compute(list(missing.values())).astype(np.float32)
            fresh = {key: row.tobytes() for key, row in zip(missing, rows, strict=True)}
            finite = {
                key: fresh[key]
                for key, row in zip(missing, rows, strict=True)
                if np.isfinite(row).all()
            }
            self._keep(finite)
            found |= fresh
        flat = np.frombuffer(b"".join(found[key] for key in keys), np.float32)
        return flat.reshape(len(keys), -1).copy()  # what is read from bytes cannot be written to

    def _known(self, keys: Sequence[Key]) -> dict[Key, bytes]:
        with self._lock:
            distinct = dict.fromkeys(keys)
            found = {key: self._entries[key] for key in distinct if key in self._entries}
            for key in found:
                self._entries.move_to_end(key)
            self.num_hits += len(found)
            self.num_misses += len(distinct) - len(found)
            return found

    def _keep(self, entries: dict[Key, bytes]) -> None:
        with self._lock:
            for key, scores in entries.items():
                self._entries[key] = scores
                self._entries.move_to_end(key)
            while len(self._entries) > self.max_entries:
                self._entries.popitem(last=False)
