"""The ways of a batch through a reward model: sequences to the hidden states that the head reads.

Legend: n sequences in a batch, T padded tokens, H hidden units. A path plans batches within a
budget; a batch gives the last hidden states of its sequences' last tokens, or of all tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from reward_actor.attention import NAME
from reward_actor.attention_plan import AttentionPlan
from reward_actor.batching import plan_batches
from reward_actor.decoder import last_layer_pooled
from reward_actor.forest import Forest, plan_forests

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from reward_actor.decoder import Decoder
    from reward_actor.extract import RewardModel

Sequences = Sequence[Sequence[int]]


class Batch(Protocol):
    """What fits in one forward pass; `indices` are the caller's of its n sequences."""

    @property
    def indices(self) -> list[int]: ...

    def pooled(self) -> Tensor:
        """(n, H): the last hidden states of the sequences' last tokens."""

    def every_token(self) -> tuple[Tensor, list[NDArray[np.int64]]]:
        """(R, H): the last hidden states of all tokens, each once, and `token_rows`."""

    def token_rows(self) -> list[NDArray[np.int64]]:
        """Of each sequence the rows of its tokens, in their order, among the R computed ones."""

    @property
    def num_rows(self) -> int:
        """R: the tokens that are computed, padding included."""


class Path(Protocol):
    @property
    def name(self) -> str: ...

    def plan(self, sequences: Sequences, budget: int) -> Sequence[Batch]:
        """Every sequence in exactly one batch of at most `budget` rows or padded tokens."""


class PaddedPath:
    """One row a sequence, padded on the right, like lengths together; for every architecture."""

    name = "padded"

    def __init__(self, model: RewardModel) -> None:
        self._model = model

    def plan(self, sequences: Sequences, budget: int) -> list[_PaddedBatch]:
        batches = plan_batches([len(sequence) for sequence in sequences], budget)
        return [
            _PaddedBatch(self._model, indices, [sequences[i] for i in indices])
            for indices in batches
        ]


@dataclass(frozen=True)
class _PaddedBatch:
    model: RewardModel
    indices: list[int]
    sequences: Sequences

    def pooled(self) -> Tensor:
        hidden, lengths = self._hidden()
        rows = torch.arange(len(hidden), device=hidden.device)
        return hidden[rows, lengths.to(hidden.device) - 1]

    def every_token(self) -> tuple[Tensor, list[NDArray[np.int64]]]:
        hidden, _ = self._hidden()
        return hidden.flatten(0, 1), self.token_rows()

    def token_rows(self) -> list[NDArray[np.int64]]:
        lengths = [len(sequence) for sequence in self.sequences]
        return [np.arange(n) + max(lengths) * row for row, n in enumerate(lengths)]

    @property
    def num_rows(self) -> int:
        return len(self.sequences) * max(map(len, self.sequences))

    def _hidden(self) -> tuple[Tensor, Tensor]:
        input_ids, lengths = pad_right(self.sequences)
        return self.model.hidden_states(input_ids.to(self.model.device)), lengths


class ForestPath:
    """Every distinct prefix once: see `reward_actor.forest`.

    With a decoder in blocks of rows, otherwise through `transformers`' own forward.
    """

    def __init__(self, model: RewardModel, decoder: Decoder | None = None) -> None:
        self._model = model
        self.decoder = decoder
        self.name = "forest"
        if decoder is not None:
            self.name += " in compiled blocks" if decoder.is_compiled else " in blocks"

    def plan(self, sequences: Sequences, budget: int) -> list[_ForestBatch]:
        forests = plan_forests(sequences, budget)
        return [_ForestBatch(self._model, self.decoder, forest) for forest in forests]


@dataclass(frozen=True)
class _ForestBatch:
    model: RewardModel
    decoder: Decoder | None
    forest: Forest

    @property
    def indices(self) -> list[int]:
        return [int(i) for i in self.forest.indices]

    def pooled(self) -> Tensor:
        last = AttentionPlan(self.forest, self.model.device, pooled=True)
        if self.decoder is None:
            with last_layer_pooled(self.model.backbone, last) as is_pooled:
                hidden = self._every_row()
            hidden = hidden if is_pooled else hidden[self._tensor(last.query_rows)]
        else:
            every = AttentionPlan(self.forest, self.model.device)
            hidden = self.decoder.pooled(every, last, *self._inputs())
        # Equal sequences end in one row.
        return hidden[self._tensor(np.searchsorted(last.query_rows, self.forest.last_rows))]

    def every_token(self) -> tuple[Tensor, list[NDArray[np.int64]]]:
        return self._every_row(), self.token_rows()

    def token_rows(self) -> list[NDArray[np.int64]]:
        return [self.forest.path_rows(int(segment)) for segment in self.forest.last_segments]

    @property
    def num_rows(self) -> int:
        return self.forest.num_rows

    def _every_row(self) -> Tensor:
        plan = AttentionPlan(self.forest, self.model.device)
        ids, positions = self._inputs()
        if self.decoder is not None:
            return self.decoder.all_rows(plan, ids, positions)
        with _forest_attention(self.model):
            hidden = self.model.hidden_states(ids[None], position_ids=positions[None], forest=plan)
        return hidden[0]

    def _inputs(self) -> tuple[Tensor, Tensor]:
        return self._tensor(self.forest.token_ids), self._tensor(self.forest.position_ids)

    def _tensor(self, array: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(array).to(self.model.device)


@contextmanager
def _forest_attention(model: RewardModel) -> Iterator[None]:
    """Let the layers call `reward_actor.attention.forest_attention`."""
    config = model.backbone.config
    before = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before


def pad_right(rows: Sequences) -> tuple[Tensor, Tensor]:
    """n rows of ids -> (n, T) ids, padded with 0 on the right, and their (n,) lengths."""
    lengths = torch.tensor([len(row) for row in rows])
    input_ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
    for index, row in enumerate(rows):
        input_ids[index, : len(row)] = torch.as_tensor(row, dtype=torch.long)
    return input_ids, lengths
