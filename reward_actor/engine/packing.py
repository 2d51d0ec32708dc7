"""How sequences share a forward pass: one row each with padding, or a forest of shared prefixes.

Legend: n sequences in a batch, T padded tokens, H hidden units. A packing plans batches within a
budget; a batch gives the last hidden states of its sequences' last tokens, or of all tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from reward_actor.engine.attention import NAME
from reward_actor.engine.attention_plan import AttentionPlan, Kernel
from reward_actor.engine.decoder import last_layer_pooled
from reward_actor.engine.forest import Forest, plan_forests
from reward_actor.transformers_internals import attention_is

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from reward_actor.engine.decoder import Decoder
    from reward_actor.model.reward_model import RewardModel


def plan_batches(lengths: Sequence[int], max_batch_tokens: int) -> list[list[int]]:
    """Indices of every sequence exactly once, in batches within `max_batch_tokens` padded tokens.

    Longest first, so that a batch that does not fit in memory shows at once and neighbours have
    like lengths. A sequence longer than the budget gets a batch of its own.
    """
    if max_batch_tokens < 1:
        raise ValueError(f"max_batch_tokens is {max_batch_tokens}; it must be at least 1")
    batches: list[list[int]] = []
    longest = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batches and (len(batches[-1]) + 1) * longest <= max_batch_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
            longest = max(1, lengths[index])
    return batches


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


class Packing(Protocol):
    @property
    def name(self) -> str: ...

    def plan(self, sequences: Sequences, budget: int) -> Sequence[Batch]:
        """Every sequence in exactly one batch of at most `budget` rows or padded tokens."""


class PaddedPacking:
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


class ForestPacking:
    """Every distinct prefix once: see `reward_actor.engine.forest`.

    With a decoder in blocks of rows, otherwise through `transformers`' own forward; with a kernel
    for its attention, where that is not what every machine has.
    """

    def __init__(
        self, model: RewardModel, decoder: Decoder | None = None, kernel: Kernel | None = None
    ) -> None:
        self._model = model
        self.decoder = decoder
        self._kernel = kernel
        self.name = "forest"
        if decoder is not None:
            self.name += " in compiled blocks" if decoder.is_compiled else " in blocks"
        if kernel is not None:
            self.name += f", {kernel}"

    def plan(self, sequences: Sequences, budget: int) -> list[_ForestBatch]:
        forests = plan_forests(sequences, budget)
        return [_ForestBatch(self._model, self.decoder, f, self._kernel) for f in forests]


@dataclass(frozen=True)
class _ForestBatch:
    model: RewardModel
    decoder: Decoder | None
    forest: Forest
    kernel: Kernel | None

    @property
    def indices(self) -> list[int]:
        return [int(i) for i in self.forest.indices]

    def pooled(self) -> Tensor:
        every = AttentionPlan(self.forest, self.model.device, kernel=self.kernel)
        last = every.of_pooled()
        if self.decoder is None:
            with last_layer_pooled(self.model.backbone, last) as is_pooled:
                hidden = self._every_row(every)
            hidden = hidden if is_pooled else hidden[self._tensor(last.query_rows)]
        else:
            hidden = self.decoder.hidden_states(*self._inputs(), every, last)
        # Equal sequences end in one row.
        return hidden[self._tensor(np.searchsorted(last.query_rows, self.forest.last_rows))]

    def every_token(self) -> tuple[Tensor, list[NDArray[np.int64]]]:
        plan = AttentionPlan(self.forest, self.model.device, kernel=self.kernel)
        return self._every_row(plan), self.token_rows()

    def token_rows(self) -> list[NDArray[np.int64]]:
        return [self.forest.path_rows(int(segment)) for segment in self.forest.last_segments]

    @property
    def num_rows(self) -> int:
        return self.forest.num_rows

    def _every_row(self, plan: AttentionPlan) -> Tensor:
        ids, positions = self._inputs()
        if self.decoder is not None:
            return self.decoder.hidden_states(ids, positions, plan)
        with attention_is(self.model.backbone.config, NAME):
            hidden = self.model.hidden_states(ids[None], position_ids=positions[None], forest=plan)
        return hidden[0]

    def _inputs(self) -> tuple[Tensor, Tensor]:
        return self._tensor(self.forest.token_ids), self._tensor(self.forest.position_ids)

    def _tensor(self, array: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(array).to(self.model.device)


def pad_right(rows: Sequences) -> tuple[Tensor, Tensor]:
    """n rows of ids -> (n, T) ids, padded with 0 on the right, and their (n,) lengths."""
    lengths = torch.tensor([len(row) for row in rows])
    input_ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for index, row in enumerate(rows):
        input_ids[index, : len(row)] = torch.as_tensor(row, dtype=torch.long)
    return input_ids, lengths
