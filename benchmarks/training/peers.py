"""The peers' ways through one optimizer step, and what a step is measured by.

Legend: S sequences of a micro-batch (two for each pair, chosen first), T padded tokens.
"""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.profiler import record_function

from benchmarks.common import machine
from reward_actor.engine.packing import pad_right
from reward_actor.model.reward_model import RewardModel
from trainer.data.micro_batches import plan
from trainer.loss import bradley_terry
from trainer.network.packed import PackedForward

if TYPE_CHECKING:
    from benchmarks.training.engines import Engine
    from trainer.data.comparisons import Comparisons

PEERS = ("ours", "padded", "padded_sorted")
MICRO_BATCH_PAIRS = 8
OPTIMIZER = "rayward: optimizer"
"""The profiler's name for the update, after the last backward pass."""


@dataclass(frozen=True)
class Step:
    """One optimizer step of a peer."""

    losses: list[float]
    """Of each pair, in the order in which they were given."""
    grad_norm: float
    num_computed_tokens: int
    """Rows that went through the layers, padding included."""
    seconds: float
    cpu_seconds: float
    """Of all threads."""


class PaddedPairs:
    """Pairs as one padded batch: what `TrainedModel.forward` takes, as Open Instruct computes it.

    The chosen sides with the rejected ones below them, padded on the right to the longest, with the
    mask and the positions that `reward_actor.model.reward_model.get_reward` makes.
    """

    def __init__(self, model: RewardModel, sequences: Sequence[Sequence[int]]) -> None:
        self._model = model
        self.indices = [*range(0, len(sequences), 2), *range(1, len(sequences), 2)]
        self._input_ids, self._lengths = pad_right([sequences[i] for i in self.indices])
        self.num_rows = self._input_ids.numel()

    def pooled(self) -> Tensor:
        """(S, H): the last hidden states of the sequences' last tokens."""
        input_ids, lengths = (x.to(self._model.device) for x in (self._input_ids, self._lengths))
        column = torch.arange(input_ids.shape[1], device=input_ids.device)
        mask = (column < lengths[:, None]).long()
        positions = mask.cumsum(dim=1) - mask
        hidden = self._model.hidden_states(input_ids, attention_mask=mask, position_ids=positions)
        return hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1]


class Peers:
    """All peers on one engine and its network."""

    def __init__(self, engine: Engine, micro_batch_tokens: int) -> None:
        """Raises ValueError if the network cannot be packed."""
        self._engine = engine
        self._micro_batch_tokens = micro_batch_tokens
        self._forward = PackedForward(cast("Any", engine), "forest")

    def step(self, peer: str, pairs: Comparisons, chosen: Sequence[int]) -> Step:
        """One optimizer step over the `chosen` pairs; planning is part of its time."""
        _wait(self._engine.device)
        start, start_cpu = time.perf_counter(), time.process_time()
        losses: dict[int, Tensor] = {}
        num_computed_tokens = 0
        micro_batches = self._micro_batches(peer, pairs, chosen)
        for number, mine in enumerate(micro_batches):
            sequences = [ids for i in mine for ids in pairs.sequences(i)]
            batches: Sequence[Any] = (
                self._forward.plan(sequences)
                if peer == "ours"
                else [PaddedPairs(self._engine.module.model, sequences)]
            )
            rewards = self._engine(batches)[: len(sequences)]
            some = bradley_terry(rewards[0::2], rewards[1::2])
            self._engine.backward(some.sum() / len(chosen), number == len(micro_batches) - 1)
            self._engine.module.bad_rows()  # what the trainer looks at after each micro-batch
            losses |= zip(mine, some.detach(), strict=True)
            num_computed_tokens += sum(batch.num_rows for batch in batches)
        with record_function(OPTIMIZER):
            grad_norm = self._engine.step()
        _wait(self._engine.device)
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
        in_order = [float(losses[i]) for i in chosen]
        return Step(in_order, grad_norm, num_computed_tokens, seconds, cpu_seconds)

    def _micro_batches(
        self, peer: str, pairs: Comparisons, chosen: Sequence[int]
    ) -> list[list[int]]:
        if peer == "ours":
            return plan(pairs, chosen, self._micro_batch_tokens, 1, packed=True)[0]
        order = list(chosen)
        if peer == "padded_sorted":
            longest = dict(zip(chosen, pairs.longest_of(chosen), strict=True))
            order.sort(key=lambda i: longest[i])
        return [order[i : i + MICRO_BATCH_PAIRS] for i in range(0, len(order), MICRO_BATCH_PAIRS)]


def measure_memory(step: Callable[[], Step], device: torch.device) -> dict[str, int | None]:
    """The peak of a step's memory, and by how much it is above what was there before it; None
    where that cannot be measured.

    Resident memory of the process; on CUDA what PyTorch has allocated. What the step before has
    freed goes back to the system first, which costs time: such a step is not for timing.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        peak = torch.cuda.max_memory_allocated(device)
    else:
        _give_memory_back()
        if not machine.reset_peak_memory():
            return {"peak_memory_bytes": None, "step_memory_bytes": None}
        before = machine.peak_memory_bytes()
        step()
        peak = machine.peak_memory_bytes()
    return {"peak_memory_bytes": peak, "step_memory_bytes": peak - before}


def _give_memory_back() -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # only glibc has it
    if trim is not None:
        trim(0)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
