"""What passes between ingress and replicas: flat int32 ids and offsets, float32 scores. No text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from reward_actor.readout import Readout

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class FlatSequences:
    """n sequences as ids (N,) int32 and offsets (n + 1,) int64, and the version they are for."""

    ids: NDArray[np.int32]
    offsets: NDArray[np.int64]
    model_version: str

    @classmethod
    def of(cls, sequences: Sequence[Sequence[int]], model_version: str) -> FlatSequences:
        lengths = [len(sequence) for sequence in sequences]
        offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)
        ids = np.fromiter((i for s in sequences for i in s), np.int32, count=int(offsets[-1]))
        return cls(ids, offsets, model_version)

    def rows(self) -> list[list[int]]:
        return [
            self.ids[start:end].tolist()
            for start, end in zip(self.offsets[:-1], self.offsets[1:], strict=True)
        ]


@dataclass(frozen=True)
class ReplicaReply:
    """Raw scores of n sequences by K members, or why there are none: raw_scores (n, K), and
    token_scores, n arrays (tokens, K), where they were asked for.

    "other_version": this replica holds another model than the ids were rendered for.
    "overloaded": its queue is full; `retry_after_s` is when there should be room.
    "failed": the model could not be run; `reason` says why.
    """

    status: Literal["ok", "other_version", "overloaded", "failed"]
    model_version: str
    raw_scores: NDArray[np.float32] | None = None
    token_scores: list[NDArray[np.float32]] | None = None
    queue_s: float = 0.0
    score_s: float = 0.0
    retry_after_s: float = 0.0
    reason: str = ""


@dataclass(frozen=True)
class Description:
    """What an ingress must know of the model that the replicas hold.

    directory holds its tokenizer (the first member's, of an ensemble); path is the way that
    sequences take through the network, fallback_reason why it is not the fastest; max_batch_tokens
    is what was chosen where it was left open.
    """

    model_version: str
    directory: str
    dtype: str
    path: str
    fallback_reason: str | None
    max_batch_tokens: int
    contract: dict[str, Any]
    readout: Readout
    versions: dict[str, str]
