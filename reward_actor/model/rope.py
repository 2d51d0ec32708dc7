"""Rotary positions whose frequencies depend on the longest sequence of a forward pass.

`transformers` chooses them by the largest position in the batch, so sequences on either side of the
border must not share a forward pass: one of them would be scored by the other's frequencies.

longrope  two sets of frequencies, for sequences up to the length of pretraining and for longer ones
          (Ding et al., LongRoPE, arXiv:2402.13753; Phi-3, Phi-4)
dynamic   beyond that length the frequencies follow the longest sequence seen so far, so that a
          reward would depend on the past (NTK-aware scaling)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class LengthClasses:
    """Which sequences may share a forward pass.

    longest  the most tokens of a sequence whose reward is its own, or None: any number.
    """

    def __init__(self, config: PretrainedConfig) -> None:
        text = config.get_text_config()
        self._borders: list[int] = []
        self.longest: int | None = None
        for parameters in _rope_parameters(text):
            kind = parameters.get("rope_type", parameters.get("type"))
            if kind not in ("longrope", "dynamic"):
                continue
            original = parameters.get("original_max_position_embeddings") or getattr(
                text, "original_max_position_embeddings", None
            )
            border = int(original or text.max_position_embeddings)
            if kind == "longrope":
                self._borders.append(border)
            else:
                self.longest = min(border, self.longest or border)

    @property
    def count(self) -> int:
        """How many classes there are, at most."""
        return len(set(self._borders)) + 1

    def split(self, sequences: Sequence[Sequence[int]]) -> list[list[int]]:
        """The indices of the sequences, in lists that may each share a forward pass.

        Raises ValueError naming a sequence that is empty or longer than `longest`.
        """
        classes: dict[int, list[int]] = {}
        for index, sequence in enumerate(sequences):
            num_tokens = len(sequence)
            if not num_tokens:
                raise ValueError(f"sequence {index} is empty")
            if self.longest is not None and num_tokens > self.longest:
                raise ValueError(
                    f"sequence {index} has {num_tokens} tokens; beyond {self.longest} this "
                    "network's dynamic rotary positions depend on what it scored before. Set "
                    "max_length to that"
                )
            above = sum(num_tokens > border for border in self._borders)
            classes.setdefault(above, []).append(index)
        return list(classes.values())


def _rope_parameters(config: Any) -> list[Mapping[str, Any]]:
    """Those of all layers alike, or of each type of layer."""
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    nested = [value for value in found.values() if isinstance(value, Mapping)]
    return nested or [found]
