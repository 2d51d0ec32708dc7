"""The reward model deployment: one loaded model, one batcher, one device."""

from __future__ import annotations

import logging
import os
from importlib.metadata import version

import torch
from ray import serve

from reward_actor.scorer import RewardScorer
from serve.batcher import Batcher, QueueFull, ScoreFunction
from serve.config import ServeConfig
from serve.wire import Description, FlatSequences, ReplicaReply

logger = logging.getLogger("ray.serve")


@serve.deployment(name="RewardModel", max_ongoing_requests=10_000)
class RewardModelReplica:
    """Loads the model, replays its golden samples, then scores flat token ids in batches."""

    def __init__(self, config: ServeConfig) -> None:
        threads = config.threads_per_replica or (os.cpu_count() or 1) // config.num_replicas
        torch.set_num_threads(max(1, threads))
        self._scorer = RewardScorer.from_pretrained(
            config.model,
            device=config.device,
            dtype=config.dtype,
            attention=config.attention,
            max_batch_tokens=config.max_batch_tokens or None,
            trust_remote_code=config.trust_remote_code,
            cache_size=config.cache_size,
        )
        self._max_batch_tokens = self._scorer.max_batch_tokens
        self._batcher = Batcher(
            max_batch_tokens=self._max_batch_tokens, max_queued_tokens=config.max_queued_tokens
        )
        self._device_lost: str | None = None

    async def score(self, sequences: FlatSequences, token_scores: bool = False) -> ReplicaReply:
        """Raw scores of the sequences, if they were rendered for the model held here.

        `token_scores` asks for those of every token, too, from the same forward pass.
        """
        held = self._scorer.model_version
        if sequences.model_version != held:
            return ReplicaReply("other_version", held)
        function: ScoreFunction = (
            self._scorer.token_scores if token_scores else self._scorer.raw_scores
        )
        try:
            scored = await self._batcher.submit(sequences.rows(), function)
        except QueueFull as full:
            return ReplicaReply("overloaded", held, retry_after_s=full.retry_after_s)
        except (torch.OutOfMemoryError, MemoryError) as error:
            logger.error("out of memory while scoring: %s", error)
            return ReplicaReply("failed", held, reason="the device ran out of memory")
        except RuntimeError as error:
            logger.error("scoring failed: %s", error)
            if "CUDA error" in str(error):  # the process has lost its device for good
                self._device_lost = str(error)
            return ReplicaReply("failed", held, reason="the model could not be run")
        results = scored.results
        return ReplicaReply(
            "ok",
            held,
            raw_scores=self._scorer.last_scores(results) if token_scores else results,
            token_scores=list(results) if token_scores else None,
            queue_s=scored.queue_s,
            score_s=scored.score_s,
        )

    def describe(self) -> Description:
        return Description(
            model_version=self._scorer.model_version,
            directory=str(self._scorer.members[0].path.resolve()),
            dtype=self._scorer.dtype,
            path=self._scorer.path,
            fallback_reason=self._scorer.fallback_reason,
            max_batch_tokens=self._max_batch_tokens,
            contract=self._scorer.contract.to_json(),
            readout=self._scorer.readout,
            versions={name: version(name) for name in ("ray", "torch", "transformers")},
        )

    def check_health(self) -> None:
        """Ray Serve replaces a replica that raises here."""
        if self._device_lost is not None:
            raise RuntimeError(self._device_lost)
