"""Which path is exact for a network: found by trying, not by a list of names.

Synthetic groups go through a path and, one row each, through the network's own forward; the hidden
states that the head reads must agree. A sliding window is made short for it, in the network that
both run, so that short sequences reach past it. Legend: n sequences, H hidden units.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from reward_actor.engine.memory import is_out_of_memory
from reward_actor.engine.packing import Batch, Packing, PaddedPacking, Sequences
from reward_actor.engine.twin import other_layer, twin

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from reward_actor.model.reward_model import RewardModel
    from reward_actor.model.rope import LengthClasses

# float32 sums in another order differ by parts in a million; attention that sees a wrong key by
# parts in a hundred.
_FLOAT32_LIMIT = 1e-3
# Half precision: as far as padding alone moves the same sequences, times this.
_NOISE_FACTOR = 3.0
_HALF_LIMIT = 2e-2

_MAX_LENGTH = 512
_WINDOW = 64


MakePacking = Callable[["RewardModel"], Packing]


class Probe:
    """Tries paths on a network: on itself, and in half precision, or with quantised weights, on its
    float32 twin as well.

    The twin decides whether a path is exact, by the worst sequence; the network itself may then
    still overflow, or run a kernel that float32 does not have.
    """

    def __init__(
        self,
        model: RewardModel,
        classes: LengthClasses,
        budget: int,
        pooled: Callable[[Batch], Tensor] | None = None,
    ) -> None:
        """classes: which sequences may share a forward pass; budget: tokens in one; pooled: what
        runs a batch of a network in training, which must be entered by another door."""
        self._other = other_layer(model)
        self._own = _Trial(model, classes, budget, pooled or _pooled)
        self._exact = self._own
        self._unproven: str | None = None
        if self._own.is_noisy:
            # Attention has other ways with gradients.
            way = _pooled if pooled is None else _pooled_with_gradients
            try:
                other = twin(model).requires_grad_(pooled is not None)
                self._exact = _Trial(other, classes, budget, way)
            except Exception as error:  # a network's own code, with a configuration of ours
                self._unproven = f"{type(error).__name__}: {error}"

    @property
    def is_finite(self) -> bool:
        """Whether the network's hidden states are numbers at all."""
        return self._own.is_finite

    def fault(self, path: Packing, make: MakePacking) -> str | None:
        """Why `path`, which is as `make` makes it of a network, must not be used, or None.

        Whatever the network's own code raises on the way counts as a fault, but for a lack of
        memory, which is raised.
        """
        if not isinstance(path, PaddedPacking):
            if self._other is not None:
                return (
                    f"it has layers of another kind than causal softmax attention ({self._other}), "
                    "through which sequences in one row would see each other"
                )
            if self._unproven is not None:
                return f"no float32 twin proves it ({self._unproven})"
        if self._exact is not self._own:
            fault = self._exact.fault(make(self._exact.model))
            if fault is not None:
                return fault
        return self._own.fault(path)


def _pooled(batch: Batch) -> Tensor:
    return batch.pooled()


def _pooled_with_gradients(batch: Batch) -> Tensor:
    with torch.enable_grad():
        return batch.pooled().detach()


class _Trial:
    """The synthetic groups of one network with the hidden states of each sequence alone."""

    def __init__(
        self,
        model: RewardModel,
        classes: LengthClasses,
        budget: int,
        pooled: Callable[[Batch], Tensor],
    ) -> None:
        self.model = model
        self._pooled = pooled
        self._classes = classes
        self._budget = budget
        is_half = next(model.parameters()).dtype != torch.float32
        self.is_noisy = is_half or bool(getattr(model.network, "is_quantized", False))
        self.sequences = synthetic_groups(model.network.config, classes.longest or _MAX_LENGTH)
        self._is_long = torch.tensor([len(row) > _WINDOW for row in self.sequences])
        with torch.no_grad(), _short_window(model):
            padded = PaddedPacking(model)
            rows = [pooled(padded.plan([row], len(row))[0]) for row in self.sequences]
            self._alone = torch.cat(rows).float()
        # In float32 the limit is known, and there is no need to measure.
        self._noise = self._apart(PaddedPacking(model)) if self.is_noisy else None

    @property
    def is_finite(self) -> bool:
        return bool(torch.isfinite(self._alone).all())

    def fault(self, path: Packing) -> str | None:
        try:
            apart = self._apart(path)
            # Alone and of one token, too: a compiler specialises on sizes of 1, and does it now.
            for alone in (self.sequences[0], self.sequences[-1]):
                with torch.no_grad():
                    self._pooled(path.plan([alone], self._budget)[0])
        except Exception as error:  # third-party networks raise whatever they like
            if is_out_of_memory(error):
                raise
            return f"{type(error).__name__}: {error}"
        if not torch.isfinite(apart).all():
            return "hidden states are not finite"
        for of_these in (self._is_long, ~self._is_long):
            if of_these.any():
                noise = None if self._noise is None else self._noise[of_these]
                worst, limit = self._judged(apart[of_these], noise)
                if worst > limit:
                    return f"hidden states differ by {worst:.2g} of their size (limit {limit:.2g})"
        return None

    @staticmethod
    def _judged(apart: Tensor, noise: Tensor | None) -> tuple[float, float]:
        """How far from alone, and the limit."""
        if noise is None:
            return float(apart.max()), _FLOAT32_LIMIT
        # Medians: a mixture of experts may send a borderline token to another expert.
        return float(apart.median()), max(_HALF_LIMIT, _NOISE_FACTOR * float(noise.median()))

    def _apart(self, path: Packing) -> Tensor:
        """(n,) root mean square difference from each sequence alone, over the size of that."""
        hidden = torch.empty_like(self._alone)
        with torch.no_grad(), _short_window(self.model):
            for alike in self._classes.split(self.sequences):
                for batch in path.plan([self.sequences[i] for i in alike], self._budget):
                    hidden[[alike[i] for i in batch.indices]] = self._pooled(batch).float()
        difference = (hidden - self._alone).square().mean(dim=1).sqrt()
        return (difference / self._alone.square().mean(dim=1).sqrt()).cpu()


@contextmanager
def _short_window(model: RewardModel) -> Iterator[None]:
    """Shorten every sliding window of the network, wherever it is kept, while this lasts."""
    text: Any = model.network.config.get_text_config()
    holders = [text, *model.network.modules()]
    before = [
        (holder, holder.sliding_window)
        for holder in holders
        if isinstance(getattr(holder, "sliding_window", None), int)
        and holder.sliding_window > _WINDOW
    ]
    for holder, _ in before:
        holder.sliding_window = _WINDOW
    try:
        yield
    finally:
        for holder, window in before:
            holder.sliding_window = window


def synthetic_groups(config: PretrainedConfig, longest: int = _MAX_LENGTH) -> Sequences:
    """Sequences of several levels, of one token, equal ones, and some past the shortened window."""
    text = config.get_text_config()
    generate = random.Random(0)
    longest = min(
        longest, _MAX_LENGTH, getattr(text, "max_position_embeddings", None) or _MAX_LENGTH
    )

    def some(count: int) -> list[int]:
        return [generate.randrange(text.vocab_size) for _ in range(count)]

    system = some(min(3, longest // 4))
    groups = []
    for num_tokens in (20, 2 * _WINDOW + 20):
        prompt = system + some(min(num_tokens, longest // 2))
        completions = [some(count) for count in (1, 2, 9, 30)]
        groups += [prompt + completion for completion in completions]
        groups += [prompt + completions[2] + some(5), prompt + completions[3]]
        groups.append(prompt)
    groups.append(some(1))
    return [group[:longest] for group in groups]
