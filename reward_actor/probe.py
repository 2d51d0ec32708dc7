"""Which path is exact for a network: found by trying, not by a list of names.

Synthetic groups go through a path and, one row each, through the network's own forward; the hidden
states that the head reads must agree. Legend: n sequences, H hidden units.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from reward_actor.paths import PaddedPath, Path, Sequences

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from reward_actor.extract import RewardModel

# float32 sums in another order differ by parts in a million; attention that sees a wrong key by
# parts in a hundred.
_FLOAT32_LIMIT = 1e-3
# Half precision: as far as padding alone moves the same sequences, times this.
_NOISE_FACTOR = 3.0
_HALF_LIMIT = 2e-2

_LONGEST = {"cpu": 512, "cuda": 8192}


class Probe:
    """The synthetic groups of one network with the hidden states of each sequence alone."""

    def __init__(self, model: RewardModel) -> None:
        device = model.device
        self._model = model
        self.sequences = synthetic_groups(model.network.config, _LONGEST.get(device.type, 512))
        with torch.inference_mode():
            self._alone = torch.stack(
                [
                    model.hidden_states(torch.tensor([row], device=device))[0, -1].float()
                    for row in self.sequences
                ]
            )
        self._noise = self._apart(PaddedPath(model))

    def fault(self, path: Path) -> str | None:
        """Why `path` must not be used for this network, or None.

        Anything that the network's own code raises on the way counts as a fault.
        """
        try:
            apart = self._apart(path)
            # Alone and of one token, too: a compiler specialises on sizes of 1, and does it now.
            for alone in (self.sequences[0], self.sequences[-1]):
                with torch.inference_mode():
                    path.plan([alone], 10**9)[0].pooled()
        except Exception as error:  # third-party networks raise whatever they like
            return f"{type(error).__name__}: {error}"
        if not torch.isfinite(apart).all():
            return "hidden states are not finite"
        if next(self._model.parameters()).dtype == torch.float32:
            worst, limit = float(apart.max()), _FLOAT32_LIMIT
        else:
            # Medians: a mixture of experts may send a borderline token to another expert.
            worst = float(apart.median())
            limit = max(_HALF_LIMIT, _NOISE_FACTOR * float(self._noise.median()))
        if worst > limit:
            return f"hidden states differ by {worst:.2g} of their size (limit {limit:.2g})"
        return None

    def _apart(self, path: Path) -> Tensor:
        """(n,) root mean square difference from each sequence alone, over the size of that."""
        hidden = torch.empty_like(self._alone)
        with torch.inference_mode():
            for batch in path.plan(self.sequences, 10**9):
                hidden[batch.indices] = batch.pooled().float()
        difference = (hidden - self._alone).square().mean(dim=1).sqrt()
        return difference / self._alone.square().mean(dim=1).sqrt()


def synthetic_groups(config: PretrainedConfig, longest: int) -> Sequences:
    """Sequences of several levels, of one token, equal ones, and some past a sliding window."""
    text = config.get_text_config()
    generate = random.Random(0)
    longest = min(longest, getattr(text, "max_position_embeddings", None) or longest)
    past_window = min((getattr(text, "sliding_window", None) or 0) + 24, longest // 2)

    def some(count: int) -> list[int]:
        return [generate.randrange(text.vocab_size) for _ in range(count)]

    system = some(min(3, longest // 4))
    groups = []
    for num_tokens in (20, past_window):
        prompt = system + some(min(num_tokens, longest // 2))
        completions = [some(count) for count in (1, 2, 9, 30)]
        groups += [prompt + completion for completion in completions]
        groups += [prompt + completions[2] + some(5), prompt + completions[3]]
        groups.append(prompt)
    groups.append(some(1))
    return [group[:longest] for group in groups]
