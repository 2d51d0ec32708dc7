"""What passes between ingress and replicas: flat int32 ids and offsets, float32 scores. No text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from reward_actor.readout import Readout
from reward_actor.schema import ModelInfo

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class FlatSequences:
    """n sequences as ids (N,) int32 and offsets (n + 1,) int64, and the version they are for.

    num_tokens: those that are computed, shared prefixes once. waiting_tokens: what waits at the
    sender behind this message, for the replica's autoscaling to see.
    """

    ids: NDArray[np.int32]
    offsets: NDArray[np.int64]
    model_version: str
    num_tokens: int
    waiting_tokens: int = 0

    @classmethod
    def of(
        cls,
        sequences: Sequence[Sequence[int]],
        model_version: str,
        num_tokens: int,
        waiting_tokens: int = 0,
    ) -> FlatSequences:
        lengths = [len(sequence) for sequence in sequences]
        offsets = np.zeros(len(lengths) + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        ids = np.fromiter(chain.from_iterable(sequences), np.int32, count=int(offsets[-1]))
        return cls(ids, offsets, model_version, num_tokens, waiting_tokens)

    def rows(self) -> list[NDArray[np.int32]]:
        return np.split(self.ids, self.offsets[1:-1])


@dataclass(frozen=True)
class ReplicaReply:
    """Raw scores of n sequences by K members, or why there are none: raw_scores (n, K), and
    token_scores, n arrays (tokens, K), where they were asked for.

    "other_version": this replica does not hold the model that the ids were rendered for.
    "overloaded": its queue is full; `retry_after_s` is when there should be room.
    "failed": the model could not be run; `reason` says why.
    "lost": this replica can score no more and is about to be replaced.
    "asleep": it has given its memory back, until it is woken.
    generation: of the model that the replica takes for the current one; it grows with every swap.
    score_s: seconds of the batch that the sequences were part of; tokens_per_s: what this replica
    computes, as measured over the last batches.
    """

    status: Literal["ok", "other_version", "overloaded", "failed", "lost", "asleep"]
    generation: int
    raw_scores: NDArray[np.float32] | None = None
    token_scores: list[NDArray[np.float32]] | None = None
    score_s: float = 0.0
    tokens_per_s: float = 0.0
    retry_after_s: float = 0.0
    reason: str = ""


@dataclass(frozen=True)
class Description:
    """What an ingress must know of the model that a replica holds as the current one.

    name: what callers see it as. directory holds its tokenizer (the first member's, of an
    ensemble), tokenizer is its identity (`reward_actor.model.tokenizer`); max_batch_tokens is what
    was chosen where it was left open.
    """

    replica: str
    generation: int
    name: str
    directory: str
    tokenizer: str
    max_batch_tokens: int
    contract: dict[str, Any]
    readout: Readout
    info: ModelInfo

    @property
    def model_version(self) -> str:
        return self.info.model_version


@dataclass(frozen=True)
class Asleep:
    """What a replica that sleeps says in place of a `Description`, with that of what it held, if it
    has been awake."""

    replica: str
    slept_as: Description | None = None
