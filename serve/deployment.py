"""The reward model deployment: one loaded model, one batcher, one device."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING

import torch
from ray import serve

from reward_actor.scorer import RewardScorer
from serve.batcher import Batcher, QueueFull
from serve.config import ServeConfig
from serve.wire import Description, FlatSequences, ReplicaReply

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@serve.deployment(name="RewardModel", max_ongoing_requests=10_000)
class RewardModelReplica:
    """Loads the model, replays its golden samples, then scores flat token ids in batches."""

    def __init__(self, config: ServeConfig) -> None:
        threads = config.threads_per_replica or (os.cpu_count() or 1) // config.num_replicas
        torch.set_num_threads(max(1, threads))
        self._scorer = RewardScorer.from_pretrained(
            config.model,
            config.device,
            config.dtype,
            config.max_batch_tokens,
            config.trust_remote_code,
        )
        self._batcher = Batcher(
            self._raw_scores,
            max_batch_tokens=config.max_batch_tokens,
            max_queued_tokens=config.max_queued_tokens,
        )

    async def score(self, sequences: FlatSequences, token_scores: bool = False) -> ReplicaReply:
        """Raw scores of the sequences, if they were rendered for the model held here."""
        held = self._scorer.model_version
        if sequences.model_version != held:
            return ReplicaReply("other_version", held)
        rows = sequences.rows()
        try:
            scored = await self._batcher.submit(rows)
        except QueueFull as full:
            return ReplicaReply("overloaded", held, retry_after_s=full.retry_after_s)
        per_token = None
        if token_scores:
            per_token = await self._batcher.alone(self._scorer.token_scores, rows)
        return ReplicaReply(
            "ok", held, scored.raw_scores, per_token, scored.queue_s, scored.score_s
        )

    def describe(self) -> Description:
        return Description(
            model_version=self._scorer.model_version,
            path=str(self._scorer.loaded.path.resolve()),
            dtype=self._scorer.dtype,
            contract=self._scorer.contract.to_json(),
            versions={name: version(name) for name in ("ray", "torch", "transformers")},
        )

    def _raw_scores(self, rows: list[Sequence[int]]) -> NDArray[np.float32]:
        return self._scorer.raw_scores(rows)
