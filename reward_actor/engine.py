"""Token sequences through a reward model by the fastest path that is exact for it. No Ray.

Legend: n sequences, K heads. Four paths; the first that the probe finds exact is taken:
  forest in compiled blocks   `Decoder`, for networks built like Llama, on CUDA
  forest in blocks            the same without `torch.compile`
  forest                      `transformers`' own forward with our attention function
  padded                      one row a sequence, padded on the right, like lengths together
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from reward_actor.decoder import Decoder
from reward_actor.memory import default_budget, is_out_of_memory
from reward_actor.paths import Batch, ForestPath, PaddedPath, Path, Sequences
from reward_actor.probe import Probe

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from reward_actor.extract import RewardModel

    Scores = NDArray[np.float32]

logger = logging.getLogger(__name__)

Attention = Literal["auto", "forest", "padded"]


class UnscorableModel(ValueError):
    """No path gives this network's own scores."""


class Engine:
    """A reward model with its path. A score depends on its own sequence, never on neighbours."""

    def __init__(
        self,
        model: RewardModel,
        attention: Attention = "auto",
        max_batch_tokens: int | None = None,
    ) -> None:
        """max_batch_tokens: rows in one forward pass (padded tokens on the padded path); None:
        chosen from free memory.

        Raises ValueError for an unknown `attention`, for "forest" where it is not exact, and
        UnscorableModel for a network that is not exact even when it is padded.
        """
        if attention not in ("auto", "forest", "padded"):
            raise ValueError(f"attention is {attention!r}; it must be auto, forest or padded")
        if max_batch_tokens is not None and max_batch_tokens < 1:
            raise ValueError(f"max_batch_tokens is {max_batch_tokens}; it must be at least 1")
        self.model = model
        self._path, self.fallback_reason = _choose(model, attention)
        self.max_batch_tokens = max_batch_tokens or default_budget(model)

    @property
    def path(self) -> str:
        return self._path.name

    @property
    def num_heads(self) -> int:
        return int(self.model.head.out_features)

    def raw_scores(self, sequences: Sequences) -> Scores:
        """(n, K): what the heads say at the last token of every sequence."""
        scores = np.empty((len(sequences), self.num_heads), dtype=np.float32)

        def keep(places: list[int], batch: Batch) -> None:
            scores[places] = self._heads(batch.pooled())

        self._run(sequences, keep)
        return scores

    def token_scores(self, sequences: Sequences) -> list[Scores]:
        """n arrays (tokens, K): what the heads say at every token."""
        scores: list[Scores] = [np.empty((0, 0), np.float32)] * len(sequences)

        def keep(places: list[int], batch: Batch) -> None:
            for place, hidden in zip(places, batch.every_token(), strict=True):
                scores[place] = self._heads(hidden)

        self._run(sequences, keep)
        return scores

    def _heads(self, hidden: Tensor) -> Scores:
        scores: Scores = self.model.head(hidden).cpu().numpy()
        return scores

    def _run(self, sequences: Sequences, keep: Callable[[list[int], Batch], None]) -> None:
        """Hand every batch to `keep`; where one does not fit in memory, halve the budget and go on.

        Raises what the device raised when a single sequence does not fit.
        """
        left = list(range(len(sequences)))
        with torch.inference_mode():
            while left:
                batches = self._path.plan([sequences[i] for i in left], self.max_batch_tokens)
                done: set[int] = set()
                for batch in batches:
                    places = [left[i] for i in batch.indices]
                    try:
                        keep(places, batch)
                    except (RuntimeError, MemoryError) as error:
                        if not is_out_of_memory(error) or len(places) == 1:
                            raise
                        self._halve_budget([sequences[i] for i in places])
                        break
                    done.update(places)
                left = [i for i in left if i not in done]

    def _halve_budget(self, sequences: Sequence[Sequence[int]]) -> None:
        num_tokens = sum(len(sequence) for sequence in sequences)
        self.max_batch_tokens = max(1, min(self.max_batch_tokens, num_tokens) // 2)
        logger.warning("out of memory; from now on %d tokens a batch", self.max_batch_tokens)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _choose(model: RewardModel, attention: Attention) -> tuple[Path, str | None]:
    """The fastest exact path, and why it is not the forest if it is not."""
    probe = Probe(model)
    padded = PaddedPath(model)
    reason: str | None = None
    if attention != "padded":
        candidates: list[Path] = [ForestPath(model)]
        try:
            candidates.insert(0, ForestPath(model, Decoder(model.backbone)))
            # On a CPU the compiler takes a minute at every start for nothing measurable.
            if model.device.type == "cuda":
                compiled = Decoder(model.backbone, compiled=True)
                candidates.insert(0, ForestPath(model, compiled))
        except ValueError as error:
            logger.debug("no forest in blocks: %s", error)
        for path in candidates:
            reason = probe.fault(path)
            if reason is None:
                return path, None
        if attention == "forest":
            raise ValueError(f"attention is 'forest', but this model cannot be packed: {reason}")
        logger.info("%s takes the padded path: %s", type(model.network).__name__, reason)
    fault = probe.fault(padded)
    if fault is not None:
        raise UnscorableModel(
            f"{type(model.network).__name__} scores a sequence otherwise when others stand beside "
            f"it ({fault}); it attends to padding, so it cannot be scored in batches"
        )
    return padded, reason
