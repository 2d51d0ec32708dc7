"""`RewardScorer`: token sequences in, float32 rewards out. No Ray."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from reward_actor.checkpoint import LoadedModel, load
from reward_actor.engine import Attention, Engine
from reward_actor.groups import Group, GroupScores, SampleError, assemble, scorable
from reward_actor.render import Renderer

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from reward_actor.contract import ScoringContract


class RewardScorer:
    """One loaded reward model. A reward depends on its own sequence, never on its neighbours."""

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        attention: Attention = "auto",
        max_batch_tokens: int | None = None,
    ) -> None:
        """Raises ValueError as `Engine` does."""
        self.loaded = loaded
        self.renderer = Renderer(loaded.tokenizer, loaded.contract)
        self.engine = Engine(loaded.model, attention, max_batch_tokens)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        device: str = "auto",
        dtype: str = "auto",
        attention: Attention = "auto",
        max_batch_tokens: int | None = None,
        trust_remote_code: bool = False,
        check_golden: bool = True,
    ) -> RewardScorer:
        """Load a reward model, find its fastest exact path and replay its golden samples.

        device: "auto" (CUDA where there is one), "cpu", "cuda:0", ...; dtype: "auto" (the
        contract's), "float32", "bfloat16", "float16"; attention: "auto", "forest" (shared prefixes
        once) or "padded"; max_batch_tokens: rows in one forward pass, chosen from free memory when
        not given. Raises CheckpointError or ContractError (both ValueError).
        """
        loaded = load(path, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
        scorer = cls(loaded, attention=attention, max_batch_tokens=max_batch_tokens)
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

    @property
    def max_batch_tokens(self) -> int:
        return self.engine.max_batch_tokens

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
        return self.engine.raw_scores(sequences)[:, 0]

    def token_scores(self, sequences: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
        """The head's output at every token of such sequences."""
        return [scores[:, 0] for scores in self.engine.token_scores(sequences)]

    def _valid(self, sequences: Sequence[Sequence[int]]) -> list[list[int]]:
        rows = []
        for index, sequence in enumerate(sequences):
            checked = self.renderer.checked([int(i) for i in sequence])
            if isinstance(checked, SampleError):
                raise ValueError(f"sequence {index}: {checked.message}")
            rows.append(checked)
        return rows
