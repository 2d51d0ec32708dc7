"""Token sequences through a reward model by the fastest path that is exact for it. No Ray.

Legend: n sequences, K heads. The first path that the probe finds exact is taken:
  forest in compiled blocks   `Decoder`, for networks built like Llama, on CUDA
  forest in blocks            the same without `torch.compile`
  forest                      `transformers`' own forward with our attention function
  padded                      one row a sequence, padded on the right, like lengths together
Before each forest the same with another attention: "paged", vLLM's for CPUs where it is installed;
"flex", FlexAttention on CUDA in float32, and where flash attention fails.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from reward_actor.engine import paged
from reward_actor.engine.attention_plan import Kernel
from reward_actor.engine.decoder import Decoder
from reward_actor.engine.memory import LEAST_BUDGET, default_budget, is_out_of_memory, move
from reward_actor.engine.packing import Batch, ForestPacking, Packing, PaddedPacking, Sequences
from reward_actor.engine.probe import Probe
from reward_actor.model.rope import LengthClasses

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from reward_actor.model.reward_model import RewardModel

    Scores = NDArray[np.float32]

logger = logging.getLogger(__name__)

Attention = Literal["auto", "forest", "padded"]
Blocks = Literal["compiled", "plain", "none"]
"""How a decoder in blocks of rows is run, if there is one."""

Plan = Sequence[tuple[list[int], Sequence[Batch]]]
"""The batches of sequences that may share a pass, and the places of those among all of them."""

# A forward pass switches the network's attention function: one at a time for each network.
_LOCKS: WeakKeyDictionary[RewardModel, threading.Lock] = WeakKeyDictionary()

_HEAD_ROWS = 16_384
"""Rows that the float32 head reads at once when every token is scored."""


class UnscorableModel(ValueError):
    """No path gives this network's own scores."""


class Engine:
    """A reward model with its path. A score depends on its own sequence, never on neighbours.

    path             the name of the path that was taken.
    fallback_reason  why a faster one was not, or None.
    Safe to share between threads, which take turns.
    """

    def __init__(
        self,
        model: RewardModel,
        attention: Attention = "auto",
        max_batch_tokens: int | None = None,
        memory_share: float = 1.0,
    ) -> None:
        """max_batch_tokens: rows in one forward pass (padded tokens on the padded path); None:
        chosen from the memory that is free of this process's share of the device's.

        Raises ValueError for an unknown `attention`, for "forest" where it is not exact, and
        UnscorableModel for a network that is not exact even when it is padded.
        """
        if attention not in ("auto", "forest", "padded"):
            raise ValueError(f"attention is {attention!r}; it must be auto, forest or padded")
        if max_batch_tokens is not None and max_batch_tokens < 1:
            raise ValueError(f"max_batch_tokens is {max_batch_tokens}; it must be at least 1")
        self.model = model
        self.device = model.device
        self.max_batch_tokens = max_batch_tokens or default_budget(model, memory_share)
        self._classes = LengthClasses(model.network.config)
        self._lock = _LOCKS.setdefault(model, threading.Lock())
        with self._lock:
            probe = Probe(model, self._classes, self.max_batch_tokens)
            self._path, self.fallback_reason = _choose(model, attention, probe)

    @property
    def path(self) -> str:
        return self._path.name

    @property
    def longest(self) -> int | None:
        """The most tokens of a sequence that this network can score, or None: any number."""
        return self._classes.longest

    @property
    def num_heads(self) -> int:
        return int(self.model.head.out_features)

    def freeze(self) -> None:
        """Say that the weights will not change any more: on a CPU they are copied into a layout
        that it multiplies with faster."""
        if isinstance(self._path, ForestPacking) and self._path.decoder is not None:
            self._path.decoder.pack()

    def offload(self) -> None:
        """Move the weights from a GPU to host memory until `restore`; it scores nothing then."""
        with self._lock:
            move(self.model, torch.device("cpu"))

    def restore(self) -> None:
        """Move them back. Raises RuntimeError if the device has no room for them."""
        with self._lock:
            move(self.model, self.device)

    def plan(self, sequences: Sequences) -> Plan:
        """How these sequences go through the network; needs neither the device nor a turn.

        Raises ValueError as `raw_scores` does.
        """
        return [
            (places, self._path.plan([sequences[i] for i in places], self.max_batch_tokens))
            for places in self._classes.split(sequences)
        ]

    def raw_scores(self, sequences: Sequences, plan: Plan | None = None) -> Scores:
        """(n, K): what the heads say at the last token of every sequence, by a plan of them if
        there is one already.

        Raises ValueError naming a sequence that is empty, or so long that the network's positions
        would depend on what it scored before.
        """
        scores = np.empty((len(sequences), self.num_heads), dtype=np.float32)

        def keep(places: list[int], batch: Batch) -> None:
            scores[places] = self._heads(batch.pooled())

        self._run(sequences, keep, plan)
        return scores

    def token_scores(self, sequences: Sequences, plan: Plan | None = None) -> list[Scores]:
        """n arrays (tokens, K): what the heads say at every token. Raises as `raw_scores` does."""
        scores: list[Scores] = [np.empty((0, 0), np.float32)] * len(sequences)

        def keep(places: list[int], batch: Batch) -> None:
            hidden, rows = batch.every_token()
            each = np.concatenate([self._heads(part) for part in hidden.split(_HEAD_ROWS)])
            for place, own in zip(places, rows, strict=True):
                scores[place] = each[own]

        self._run(sequences, keep, plan)
        return scores

    def _heads(self, hidden: Tensor) -> Scores:
        scores: Scores = self.model.head(hidden).cpu().numpy()
        return scores

    def _run(
        self, sequences: Sequences, keep: Callable[[list[int], Batch], None], plan: Plan | None
    ) -> None:
        """Hand every batch to `keep`; where one does not fit in memory, halve the budget and go on.

        Raises what the device raised when a single sequence does not fit.
        """
        plan = self.plan(sequences) if plan is None else plan
        with self._lock, torch.inference_mode():
            for left, batches in plan:
                self._run_alike(sequences, left, batches, keep)

    def _run_alike(
        self,
        sequences: Sequences,
        left: list[int],
        batches: Sequence[Batch],
        keep: Callable[[list[int], Batch], None],
    ) -> None:
        budget = self.max_batch_tokens
        while left:
            done: set[int] = set()
            is_too_large = False
            for batch in batches:
                places = [left[i] for i in batch.indices]
                if not _fits(keep, places, batch):
                    is_too_large = True
                    break
                done.update(places)
            left = [i for i in left if i not in done]
            if is_too_large:
                # Out here nothing holds the failed pass's tensors any more.
                budget = self._halve(budget)
                batches = self._path.plan([sequences[i] for i in left], budget)

    def _halve(self, budget: int) -> int:
        """The budget for the rest of this call; later calls start from half of what they had."""
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
        self.max_batch_tokens = max(min(LEAST_BUDGET, self.max_batch_tokens), budget // 2)
        logger.warning(
            "out of memory; max_batch_tokens is %d from now on (it was %d)",
            self.max_batch_tokens,
            budget,
        )
        return max(1, budget // 2)


def _fits(keep: Callable[[list[int], Batch], None], places: list[int], batch: Batch) -> bool:
    """Run a batch; False if there is not enough memory for its several sequences at once."""
    try:
        keep(places, batch)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error) or len(places) == 1:
            raise
        return False
    return True


def _choose(model: RewardModel, attention: Attention, probe: Probe) -> tuple[Packing, str | None]:
    """The fastest exact path, and why it is not the first candidate if it is not."""
    name = type(model.network).__name__
    reason: str | None = None
    if not probe.is_finite:
        raise UnscorableModel(
            f"{name} computes hidden states that are not finite in {_dtype(model)}: its weights "
            "are damaged, or overflow in that dtype (then load it with a wider one)"
        )
    if attention != "padded":
        # On a CPU the compiler takes a minute at every start for nothing measurable.
        decoders: list[Blocks] = ["plain", "none"]
        if model.device.type == "cuda":
            decoders.insert(0, "compiled")
        for blocks, kernel in product(decoders, _kernels(model)):
            make = partial(_forest, blocks=blocks, kernel=kernel)
            uncompiled: Blocks = "plain" if blocks == "compiled" else blocks
            make_plain = partial(_forest, blocks=uncompiled, kernel=kernel)
            try:
                path = make(model)
            except ValueError as error:
                logger.debug("no forest in blocks: %s", error)
                continue
            fault = probe.fault(path, make_plain)
            if fault is None:
                return path, reason
            reason = reason or f"{path.name}: {fault}"
            logger.warning("%s cannot take the path %r: %s", name, path.name, fault)
        if attention == "forest":
            raise ValueError(f"attention is 'forest', but this model cannot be packed: {reason}")
    padded = PaddedPacking(model)
    fault = probe.fault(padded, PaddedPacking)
    if fault is not None:
        raise UnscorableModel(
            f"{name} scores a sequence otherwise when others stand beside it ({fault}); it attends "
            "to padding, so it cannot be scored in batches"
        )
    return padded, reason


def _forest(model: RewardModel, blocks: Blocks, kernel: Kernel | None) -> ForestPacking:
    """Raises ValueError where there can be no decoder in blocks."""
    decoder = None
    if blocks != "none":
        decoder = Decoder(model.backbone, compiled=blocks == "compiled")
    return ForestPacking(model, decoder, kernel)


def _kernels(model: RewardModel) -> list[Kernel | None]:
    """What attention may take here, fastest first."""
    if model.device.type == "cuda":
        # In half precision one call of flash attention takes all runs, where the device has it.
        return ["flex", None] if _dtype(model) == "float32" else [None, "flex"]
    return ["paged", None] if paged.is_better(_head_width(model), model.device) else [None]


def _head_width(model: RewardModel) -> int | None:
    """The width of the network's attention heads, or None where its configuration has no such."""
    text: Any = model.network.config.get_text_config()
    try:
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    except AttributeError:
        return None
    return int(width)


def _dtype(model: RewardModel) -> str:
    return str(next(model.parameters()).dtype).removeprefix("torch.")
