"""What a replica does: a batcher in front of its device, and the models that are loaded there."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from reward_actor import schema
from reward_actor.errors import EngineDied
from serve.config import ServeConfig
from serve.monitoring import metrics
from serve.replica.batcher import Batcher, QueueFull
from serve.replica.models import Loaded, LoadedModels, Scorer, Scoring
from serve.wire import Asleep, Description, FlatSequences, ReplicaReply

if TYPE_CHECKING:
    from serve.current_model import CurrentModel

logger = logging.getLogger("ray.serve")

# How often a replica looks whether a swap went past it.
_RECONCILE_S = 5.0
# What a message waits before it goes out again, once the model's processes have died here.
_LOST_PAUSE_S = 0.5
# The same, while this replica sleeps and another may be awake already.
_ASLEEP_PAUSE_S = 0.2
# Of a replica that has not loaded its model yet.
_UNKNOWN_BUDGET = 2**31
# An ingress that has not written for so long has nothing waiting.
_WAITING_S = 5.0


def load_scorer(config: ServeConfig, directory: str) -> Scorer:
    """The engine of the configuration with this model, its golden samples replayed.

    Raises ValueError.
    """
    if config.engine == "vllm":
        from reward_actor.vllm.scorer import VllmScorer

        scorer: Scorer = VllmScorer.from_pretrained(
            directory,
            dtype=config.dtype,
            tensor_parallel=config.tensor_parallel,
            gpu_memory_utilization=config.engine_memory_share,
            max_batch_tokens=config.max_batch_tokens or None,
            trust_remote_code=config.trust_remote_code,
        )
        return scorer
    from reward_actor.scorer import RewardScorer

    return RewardScorer.from_pretrained(
        directory,
        device=config.device,
        dtype=config.dtype,
        attention=config.attention,
        max_batch_tokens=config.max_batch_tokens or None,
        trust_remote_code=config.trust_remote_code,
        cache_size=config.cache_size,
        memory_share=config.gpus_per_replica or 1.0,
    )


class Replica:
    """Scores flat token ids in batches, and follows swaps from one model to the next."""

    def __init__(
        self,
        config: ServeConfig,
        name: str,
        models: LoadedModels,
        recorder: metrics.Recorder,
        current_model: Callable[[], CurrentModel | None],
        sleeps: Callable[[], bool],
        num_threads: int,
    ) -> None:
        """name: of this replica. current_model, sleeps: what the service remembers of its model,
        and whether it sleeps; they may take a while. num_threads: for the network, on whichever
        thread it runs."""
        import torch

        self._name = name
        self._config = config
        self._models = models
        self._current_model = current_model
        self._sleeps = sleeps
        self._is_falling_asleep = False
        self._slept_as: Description | None = None
        self._sleeping = asyncio.Lock()  # one change at a time
        self._batcher = Batcher(
            max_batch_tokens=(
                _UNKNOWN_BUDGET if models.is_asleep else models.current.scorer.max_batch_tokens
            ),
            max_queued_tokens=config.max_queued_tokens,
            target_batch_s=config.target_batch_s,
            on_batch=self._scored_batch,
            # OpenMP counts for each thread that asks: what was set for loading holds there alone,
            # and Ray gives every other thread of a worker one.
            on_device=partial(torch.set_num_threads, num_threads),
        )
        self._recorder = recorder
        self._waiting: dict[str, tuple[float, int]] = {}
        self._fault: str | None = None
        self._has_lost_device = False
        self._reconciler: asyncio.Task[None] | None = None

    async def score(
        self, sequences: FlatSequences, token_scores: bool = False, sender: str = ""
    ) -> ReplicaReply:
        """Raw scores of the sequences, if they were rendered for a model loaded here.

        `token_scores` asks for those of every token, too, from the same forward pass.
        """
        self._start_reconciling()
        self._waiting[sender] = time.monotonic(), sequences.waiting_tokens
        generation = self._models.generation
        if self._is_asleep:
            return ReplicaReply("asleep", generation, retry_after_s=_ASLEEP_PAUSE_S)
        lost = ReplicaReply("lost", generation, retry_after_s=_LOST_PAUSE_S)
        if self._has_lost_device:
            return lost
        loaded = self._models.find(sequences.model_version)
        if loaded is None:
            return ReplicaReply("other_version", generation)
        work = Scoring(loaded.scorer, token_scores)
        try:
            scored = await self._batcher.submit(sequences.rows(), sequences.num_tokens, work)
        except QueueFull as full:
            return ReplicaReply("overloaded", generation, retry_after_s=full.retry_after_s)
        except MemoryError as error:
            logger.error("out of memory while scoring: %s", error)
            return ReplicaReply("failed", generation, reason="the device ran out of memory")
        except EngineDied as error:
            logger.error("the model is gone: %s", error)
            return lost
        except ValueError as error:  # a sequence that this network cannot take
            logger.error("no plan to score this: %s", error)
            return ReplicaReply("failed", generation, reason="the model cannot take this sequence")
        except RuntimeError as error:
            logger.error("scoring failed: %s", error)
            if self._loses_device(error):
                return lost
            reason = "the model could not be run"
            if "out of memory" in str(error):
                reason = "the device ran out of memory"
            return ReplicaReply("failed", generation, reason=reason)
        results = scored.results
        return ReplicaReply(
            "ok",
            generation,
            raw_scores=np.stack([row[-1] for row in results]) if token_scores else results,
            token_scores=list(results) if token_scores else None,
            score_s=scored.score_s,
            tokens_per_s=self._batcher.rate.tokens_per_s,
        )

    async def describe(self) -> Description | Asleep:
        self._start_reconciling()
        if self._is_asleep:
            return Asleep(self._name, self._slept_as)
        return self._describe(self._models.current)

    @property
    def _is_asleep(self) -> bool:
        return self._is_falling_asleep or self._models.is_asleep

    async def sleep(self) -> schema.ReplicaState:
        """Finish what came before, then give the weights' memory back; until `wake`, nothing is
        scored."""
        started = time.monotonic()
        async with self._sleeping:
            self._is_falling_asleep = True
            try:
                await self._batcher.idle()
                if not self._models.is_asleep:
                    self._slept_as = self._describe(self._models.current)
                error = await self._changed(self._models.sleep)
            finally:
                self._is_falling_asleep = False
        return self._state(started, error)

    async def wake(self) -> schema.ReplicaState:
        """Hold the model again. It sleeps on where that fails, and says why."""
        started = time.monotonic()
        async with self._sleeping:
            error = await self._changed(self._models.wake)
            if not self._models.is_asleep:
                self._batcher.max_batch_tokens = self._models.current.scorer.max_batch_tokens
        return self._state(started, error)

    async def _changed(self, change: Callable[[], None]) -> str | None:
        """Why it could not be changed, if it could not."""
        from reward_actor.engine.memory import is_out_of_memory

        try:
            await asyncio.to_thread(change)
        except (ValueError, OSError) as error:
            return str(error).replace(self._models.directory, "the model")
        except Exception as error:  # engines have types of their own
            logger.error("sleeping or waking failed: %s", error)
            if is_out_of_memory(error):
                return "its memory is taken by others, who must give it back first"
            self._loses_device(error)
            return f"the device or the engine failed ({type(error).__name__}); its log says why"
        return None

    def _loses_device(self, error: Exception) -> bool:
        """Whether the process has lost its device for good, so that it has to be replaced."""
        if "CUDA error" not in str(error):
            return False
        self._has_lost_device = True
        self._fault = str(error)
        return True

    def _state(self, started: float, error: str | None) -> schema.ReplicaState:
        return schema.ReplicaState(
            replica=self._name,
            asleep=self._is_asleep,
            seconds=time.monotonic() - started,
            error=error,
        )

    async def prepare(self, directory: str) -> Description | str:
        """Load a candidate alongside the current model; why it cannot be served, if it cannot."""
        try:
            loaded = await asyncio.to_thread(self._models.prepare, directory)
        except (ValueError, OSError) as error:
            return str(error)
        except (MemoryError, RuntimeError) as error:
            logger.error("no candidate could be loaded: %s", error)
            return "it does not fit in memory alongside the current model, or could not be run"
        return self._describe(loaded)

    async def activate(self, model_version: str, generation: int, name: str) -> bool:
        """Make the candidate the current model."""
        done = self._models.activate(model_version, generation, name)
        if not self._is_asleep:
            self._batcher.max_batch_tokens = self._models.current.scorer.max_batch_tokens
        return done

    async def discard_candidate(self) -> None:
        await asyncio.to_thread(self._models.discard_candidate)

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What Ray Serve hands to the scaling policy: queued work, and how fast it goes."""
        now = time.monotonic()
        waiting = [tokens for when, tokens in self._waiting.values() if now - when < _WAITING_S]
        return {
            "queued_tokens": float(self._batcher.queued_tokens + sum(waiting)),
            "tokens_per_s": self._batcher.rate.tokens_per_s,
        }

    def _scored_batch(self, num_tokens: int, seconds: float) -> None:
        self._recorder.observe(metrics.BATCH_TOKENS, num_tokens)
        self._recorder.observe(metrics.BATCH_SECONDS, seconds)

    def check_health(self) -> None:
        """Ray Serve replaces a replica that raises here."""
        if self._fault is not None:
            raise RuntimeError(self._fault)
        self._models.check()

    def _describe(self, loaded: Loaded) -> Description:
        scorer = loaded.scorer
        return Description(
            replica=self._name,
            generation=self._models.generation,
            name=self._models.name,
            directory=str(scorer.tokenizer_path),
            tokenizer=loaded.tokenizer,
            max_batch_tokens=scorer.max_batch_tokens,
            contract=scorer.contract.to_json(),
            readout=scorer.readout,
            info=loaded.info,
        )

    def _start_reconciling(self) -> None:
        if self._reconciler is None:
            self._reconciler = asyncio.get_running_loop().create_task(self._reconcile())

    async def _reconcile(self) -> None:
        while self._fault is None:  # after one, this replica is about to be replaced
            try:
                self._tell()
                await asyncio.to_thread(self._models.retire)
                await self._follow_sleep()
                if not self._is_asleep:
                    await self._follow()
            except Exception as error:  # whatever it is must not end it for good
                logger.warning("no look for swaps this time: %s", type(error).__name__)
            await asyncio.sleep(_RECONCILE_S)

    def _tell(self) -> None:
        queued, rate = self._batcher.queued_tokens, self._batcher.rate.tokens_per_s
        self._recorder.gauge(metrics.REPLICA_QUEUE, queued, self._name)
        self._recorder.gauge(metrics.TOKENS_PER_S, rate, self._name)

    async def _follow_sleep(self) -> None:
        """Sleep or wake as the service does, where this replica was not asked."""
        sleeps = await asyncio.to_thread(self._sleeps)
        if sleeps == self._models.is_asleep or self._sleeping.locked():
            return
        state = await (self.sleep() if sleeps else self.wake())
        if state.error is not None:
            self._fault = f"it could not {'sleep' if sleeps else 'wake'}: {state.error}"
            logger.error(self._fault)

    async def _follow(self) -> None:
        """Follow a swap that this replica was not asked about, because it was starting then."""
        current = await asyncio.to_thread(self._current_model)
        if current is None or not current.is_of(self._config.model):
            return
        if current.generation <= self._models.generation:
            return
        await asyncio.sleep(_RECONCILE_S)  # the swap itself may be about to reach it
        if current.generation <= self._models.generation:
            return
        prepared = await self.prepare(current.directory)
        if isinstance(prepared, str):
            self._fault = f"generation {current.generation} cannot be loaded: {prepared}"
            logger.error(self._fault)
            return
        name = current.name or self._config.name
        await self.activate(prepared.model_version, current.generation, name)
