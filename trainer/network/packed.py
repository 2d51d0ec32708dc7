"""One micro-batch of a training: sequences to raw scores, packed as for scoring.

Legend: S sequences in a micro-batch, R rows that are computed for them (R < their tokens where
prefixes are shared), A outputs of the head.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from reward_actor.engine.attention import flex_fault
from reward_actor.engine.packing import Batch, ForestPacking, Packing, PaddedPacking
from reward_actor.engine.probe import Probe
from reward_actor.model.rope import LengthClasses
from trainer.network.collectives import from_all
from trainer.network.routers import RouterLogits

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine
    from numpy.typing import NDArray

    from reward_actor.model.reward_model import RewardModel

logger = logging.getLogger(__name__)

_UNLIMITED = 2**31


class TrainedModel(nn.Module):
    """A reward model as the root module under DeepSpeed.

    Every micro-batch is one call of its `forward`, however packed: ZeRO 3 starts again at the root.
    """

    def __init__(self, model: RewardModel) -> None:
        super().__init__()
        self.model = model
        self.routers = RouterLogits(model)
        self._bad_rows: list[Tensor] = []
        model.backbone.get_input_embeddings().register_forward_hook(self._watch_gradient)

    def forward(self, batches: Sequence[Batch], *, hidden: bool = False) -> Tensor:
        """Batches of S sequences together -> (S,) or (S, A) float32 raw scores in the sequences'
        order; with `hidden` the (S, H) last hidden states that the head would read."""
        self.routers.logits.clear()
        self._bad_rows = []
        pooled = [batch.pooled() for batch in batches]
        outputs = pooled if hidden else [self.model.head(rows).squeeze(-1) for rows in pooled]
        order = np.argsort(np.concatenate([batch.indices for batch in batches]))
        joined = torch.cat(outputs)
        return joined[torch.from_numpy(order).to(joined.device)]

    def _watch_gradient(self, _module: nn.Module, _inputs: Any, embedded: Tensor) -> None:
        # What is not finite anywhere in the network's gradient comes down to the embeddings.
        if embedded.requires_grad:
            seen, number = self._bad_rows, len(self._bad_rows)
            seen.append(torch.zeros(embedded[..., 0].numel(), dtype=torch.bool))

            def look(gradient: Tensor) -> None:  # the last batch's comes first
                seen[number] = ~torch.isfinite(gradient.detach()).flatten(0, -2).all(dim=-1)

            embedded.register_hook(look)

    def bad_rows(self) -> NDArray[np.bool_] | None:
        """(R,) which rows' gradients of the last micro-batch are not finite; None where none come
        down to the embeddings, because they are frozen."""
        bad = [rows.cpu().numpy() for rows in self._bad_rows]
        return np.concatenate(bad) if bad else None


class PackedForward:
    """How a network's micro-batches are computed: packed where that is exact, else padded."""

    def __init__(self, engine: DeepSpeedEngine, packing: str) -> None:
        """Raises ValueError if packing is "forest" and the network cannot be packed.

        On every worker at once: the network is tried.
        """
        self._engine = engine
        model = engine.module.model
        self._classes = LengthClasses(model.network.config)
        self.path: Packing = PaddedPacking(model)
        self.why_padded: str | None = "training.packing is padded"
        if packing != "padded":
            probe = Probe(model, self._classes, _UNLIMITED, self._hidden)
            for make in _forests(model):
                forest = make(model)
                # The same way on all workers, or they would not meet.
                faults = from_all(probe.fault(forest, make))
                fault = next((fault for fault in faults if fault is not None), None)
                if fault is None:
                    self.path, self.why_padded = forest, None
                    break
                self.why_padded = fault
        if packing == "forest" and self.why_padded is not None:
            raise ValueError(
                f"training.packing: this network cannot be packed ({self.why_padded}); use auto"
            )

    @property
    def packed(self) -> bool:
        return self.why_padded is None

    @property
    def described(self) -> str:
        """The path that micro-batches take, and why it is not the other one."""
        return self.path.name if self.packed else f"{self.path.name} ({self.why_padded})"

    def _hidden(self, batch: Batch) -> Tensor:
        with torch.enable_grad():  # attention has other ways without gradients
            output: Tensor = self._engine([batch], hidden=True)
        return output.detach()[list(batch.indices)]

    def plan(self, sequences: Sequence[Sequence[int]]) -> list[Batch]:
        """One micro-batch, in as many batches as the rotary positions ask for: always the same
        number, so that all workers make the same calls. Without sequences, a row of one token."""
        num_classes = self._classes.count
        alike = self._classes.split(sequences) if sequences else []
        batches: list[Batch] = []
        for indices in alike:
            (batch,) = self.path.plan([sequences[i] for i in indices], _UNLIMITED)
            batches.append(_Renumbered(batch, indices))
        while len(batches) < num_classes:
            (batch,) = self.path.plan([[0]], _UNLIMITED)
            batches.append(_Renumbered(batch, [len(sequences) + len(batches)]))
        return batches

    def run(self, batches: Sequence[Batch], num_sequences: int) -> Tensor:
        """The raw scores of the first `num_sequences`; rows that only keep step are left out, with
        a gradient of zero."""
        output: Tensor = self._engine(batches)
        return output[:num_sequences]


def _forests(model: RewardModel) -> list[Callable[[RewardModel], Packing]]:
    """The ways to pack, fastest first. On every worker at once."""
    ways: list[Callable[[RewardModel], Packing]] = [ForestPacking]
    first, heads = next(model.parameters()), _heads(model)
    # In half precision one call of flash attention takes all segments; without it, and without
    # FlexAttention, each segment is a call of its own.
    if first.is_cuda and first.dtype == torch.float32 and heads is not None:
        # A compiler that fails on one worker must not do so in the middle of a network whose
        # weights the others wait for.
        faults = from_all(flex_fault(*heads, first.dtype, first.device))
        if not any(faults):
            ways.insert(0, partial(ForestPacking, kernel="flex"))
        else:
            logger.warning("no FlexAttention: %s", next(filter(None, faults)))
    return ways


def _heads(model: RewardModel) -> tuple[int, int, int] | None:
    """Query heads, key heads, width; None where the configuration does not have them."""
    text: Any = model.network.config.get_text_config()
    try:
        num = int(text.num_attention_heads)
        width = getattr(text, "head_dim", None) or text.hidden_size // num
    except AttributeError:
        return None
    return num, int(getattr(text, "num_key_value_heads", None) or num), int(width)


class _Renumbered:
    """A batch of some of a micro-batch's sequences, by their numbers in the micro-batch."""

    def __init__(self, batch: Batch, indices: Sequence[int]) -> None:
        self._batch = batch
        self.indices = [indices[i] for i in batch.indices]
        self.num_rows = batch.num_rows

    def pooled(self) -> Tensor:
        return self._batch.pooled()

    def token_rows(self) -> list[NDArray[np.int64]]:
        return self._batch.token_rows()

    def every_token(self) -> tuple[Tensor, list[NDArray[np.int64]]]:
        return self._batch.every_token()


def row_weights(batches: Sequence[Batch], num_sequences: int) -> NDArray[np.float32]:
    """(R,) how many of the first `num_sequences` each computed row stands for; 0 for padding."""
    parts = []
    for batch in batches:
        weights = np.zeros(batch.num_rows, dtype=np.float32)
        for index, rows in zip(batch.indices, batch.token_rows(), strict=True):
            if index < num_sequences:
                weights[rows] += 1
        parts.append(weights)
    return np.concatenate(parts)


def sequences_of(batches: Sequence[Batch], bad: NDArray[np.bool_]) -> list[int]:
    """The sequences that one of the computed rows marked in `bad` (R,) belongs to."""
    found = []
    start = 0
    for batch in batches:
        mine = bad[start : start + batch.num_rows]
        start += batch.num_rows
        for index, rows in zip(batch.indices, batch.token_rows(), strict=True):
            if mine[rows].any():
                found.append(index)
    return sorted(found)
