"""`RewardScorer`: token sequences in, float32 rewards out. No Ray."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from reward_actor.batching import plan_batches
from reward_actor.checkpoint import LoadedModel, load
from reward_actor.groups import Group, GroupScores, SampleError, assemble, scorable
from reward_actor.render import Renderer

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from reward_actor.contract import ScoringContract

DEFAULT_MAX_BATCH_TOKENS = 16_384


class RewardScorer:
    """One loaded reward model. A reward depends on its own sequence, never on its neighbours."""

    def __init__(
        self, loaded: LoadedModel, *, max_batch_tokens: int = DEFAULT_MAX_BATCH_TOKENS
    ) -> None:
        self.loaded = loaded
        self.renderer = Renderer(loaded.tokenizer, loaded.contract)
        self.max_batch_tokens = max_batch_tokens

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        device: str = "auto",
        dtype: str = "auto",
        max_batch_tokens: int | None = None,
        trust_remote_code: bool = False,
        check_golden: bool = True,
    ) -> RewardScorer:
        """Load a reward model and replay its golden samples.

        device: "auto" (CUDA where there is one), "cpu", "cuda:0", ...; dtype: "auto" (the
        contract's), "float32", "bfloat16", "float16"; max_batch_tokens: padded tokens in one
        forward pass. Raises CheckpointError or ContractError (both ValueError).
        """
        loaded = load(path, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
        scorer = cls(loaded, max_batch_tokens=max_batch_tokens or DEFAULT_MAX_BATCH_TOKENS)
        if check_golden and loaded.contract.golden.samples:
            from reward_actor.golden import replay

            replay(scorer)
        return scorer

    @property
    def contract(self) -> ScoringContract:
        return self.loaded.contract

    @property
    def model_version(self) -> str:
        return self.loaded.version

    @property
    def dtype(self) -> str:
        return self.loaded.dtype

    def score(self, groups: Sequence[Group], token_rewards: bool = False) -> list[GroupScores]:
        """Score every completion of every group; one that cannot be scored carries its error."""
        rendered = [self.renderer.sequences(group) for group in groups]
        sequences = scorable(rendered)
        if token_rewards:
            per_token = [row.tolist() for row in self.token_scores(sequences)]
            raw = [row[-1] for row in per_token]
        else:
            per_token = None
            raw = self.raw_scores(sequences).tolist()
        return assemble(rendered, raw, self.contract, self.model_version, per_token)

    def score_ids(self, sequences: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Rewards of whole token sequences, as given: (n,) float32.

        Raises ValueError naming the first sequence that is empty, too long, outside the
        vocabulary, or whose reward is not finite.
        """
        rows = self._valid(sequences)
        rewards = (self.raw_scores(rows) - self.contract.mean) / self.contract.std
        bad = np.flatnonzero(~np.isfinite(rewards))
        if len(bad):
            raise ValueError(f"sequence {bad[0]}: the model's reward is not finite")
        return rewards.astype(np.float32)

    def token_rewards(self, sequences: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
        """The reward at every token of every sequence. Raises ValueError as `score_ids` does."""
        contract = self.contract
        scores = self.token_scores(self._valid(sequences))
        return [((row - contract.mean) / contract.std).astype(np.float32) for row in scores]

    def raw_scores(self, sequences: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """The head's output for sequences that `Renderer.checked` has passed: (n,) float32."""
        scores = np.empty(len(sequences), dtype=np.float32)
        for indices, input_ids, lengths in self._batches(sequences):
            scores[indices] = self.loaded.model(input_ids, lengths).cpu().numpy()
        return scores

    def token_scores(self, sequences: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
        rows: list[NDArray[np.float32]] = [np.empty(0, np.float32)] * len(sequences)
        for indices, input_ids, _ in self._batches(sequences):
            batch = self.loaded.model.token_scores(input_ids).cpu().numpy()
            for row, index in zip(batch, indices, strict=True):
                rows[index] = row[: len(sequences[index])]
        return rows

    def _batches(
        self, sequences: Sequence[Sequence[int]]
    ) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        device = next(self.loaded.model.parameters()).device
        with torch.inference_mode():
            for indices in plan_batches([len(s) for s in sequences], self.max_batch_tokens):
                input_ids, lengths = pad_right([sequences[i] for i in indices])
                yield indices, input_ids.to(device), lengths.to(device)

    def _valid(self, sequences: Sequence[Sequence[int]]) -> list[list[int]]:
        rows = []
        for index, sequence in enumerate(sequences):
            checked = self.renderer.checked([int(i) for i in sequence])
            if isinstance(checked, SampleError):
                raise ValueError(f"sequence {index}: {checked.message}")
            rows.append(checked)
        return rows


def pad_right(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """n rows of ids -> (n, T) ids, padded with 0 on the right, and their (n,) lengths."""
    lengths = torch.tensor([len(row) for row in rows])
    input_ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
    for index, row in enumerate(rows):
        input_ids[index, : len(row)] = torch.as_tensor(row, dtype=torch.long)
    return input_ids, lengths
