"""What one ingress tells of itself: metrics, request lines, and the live rewards of all ingresses.

The hot path only adds up here; a task of its own hands over every other second.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING

from reward_actor.contract import ScoringContract
from reward_actor.ray_internals import kv_delete, kv_get, kv_keys, kv_put
from reward_actor.schema import MonitoredModel, MonitorReply, MonitorWarning
from serve.config import ServeConfig
from serve.monitoring import metrics
from serve.monitoring.live_rewards import LiveRewards, Reference, dump, load
from serve.monitoring.monitor import Monitor
from serve.monitoring.request_log import CURRENT, Answered, LogFile

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from reward_actor.groups import GroupScores
    from serve.wire import Description

logger = logging.getLogger("ray.serve")

_TICK_S = 2.0
# What an ingress told longer ago is not counted, and at last removed: it has ended.
_FRESH_S = 10.0
_GONE_S = 600.0
# Of a model version's hash, as the value of a label.
_SHOWN_DIGITS = 12


class Observer:
    """Use from one event loop. `watch` begins; until then nothing is told."""

    def __init__(
        self,
        config: ServeConfig,
        app_name: str,
        sender: str,
        log_file: Path | None,
        queued_tokens: Callable[[], int],
    ) -> None:
        self._prefix = f"{app_name}:live:"
        self._sender = sender
        self._is_alone = config.num_ingress == 1
        self._queued_tokens = queued_tokens
        self._recorder = metrics.Recorder()
        self._monitor = Monitor(config)
        self._log = LogFile(log_file, every_request=config.access_log)
        self._others: list[dict[str, LiveRewards]] = []
        self._num_replicas = 0
        self._task: asyncio.Task[None] | None = None

    def watch(self) -> None:
        """Hand over what is known, from now on."""
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run())

    # ---- what happens

    def replicas_are(self, descriptions: list[Description]) -> None:
        self._num_replicas = len(descriptions)
        if not descriptions:
            return
        newest = max(descriptions, key=lambda description: description.generation)
        if self._monitor.knows(newest.model_version):
            return
        contract = ScoringContract.from_json(newest.contract)
        held_out = contract.held_out
        reference = None if held_out is None else Reference(held_out, contract.mean, contract.std)
        self._monitor.serve(newest.model_version, reference)

    def scored(
        self,
        results: Sequence[GroupScores],
        model_rewards: Sequence[Sequence[float | None]],
        model_version: str,
        timings_ms: Mapping[str, float],
        computed_tokens: int,
    ) -> None:
        """A request has its scores; model_rewards: without what functions add; `computed_tokens`
        counts shared prefixes once."""
        num_samples = num_tokens = 0
        for group, rewards in zip(results, model_rewards, strict=True):
            num_samples += len(group.rewards)
            num_tokens += sum(group.num_tokens)
            for error in filter(None, group.errors):
                self._recorder.count(metrics.SAMPLE_ERRORS, 1, error.type)
            self._monitor.add(model_version, rewards, group.num_tokens)
        for stage, ms in timings_ms.items():
            self._recorder.observe(metrics.LATENCY, ms / 1e3, stage)
        self._recorder.count(metrics.SAMPLES, num_samples)
        self._recorder.count(metrics.TOKENS, num_tokens)
        self._recorder.count(metrics.COMPUTED_TOKENS, computed_tokens)
        self._recorder.count(metrics.SAVED_TOKENS, num_tokens - computed_tokens)
        answered = CURRENT.get()
        if answered is not None:
            answered.num_samples += num_samples
            answered.num_tokens += num_tokens
            answered.model_version = model_version

    def answered(self, answered: Answered) -> None:
        """An HTTP request is over."""
        self._recorder.count(metrics.REQUESTS, 1, answered.route, str(answered.status))
        if answered.error_type is not None:
            self.refused(answered.error_type)
        self._log.add(answered)

    def refused(self, type_: str) -> None:
        self._recorder.count(metrics.REJECTIONS, 1, type_)

    def error_rewarded(self, type_: str) -> None:
        """A sample with this error was answered with `error_reward`."""
        self._recorder.count(metrics.ERROR_REWARDS, 1, type_)

    def swapped(self, outcome: str) -> None:
        """`done`, or the type of the error."""
        self._recorder.count(metrics.SWAPS, 1, outcome)

    # ---- what is told

    def monitor(self) -> MonitorReply:
        """The live rewards at all ingresses."""
        return self._monitor.reply(self._others)

    def warnings(self) -> list[MonitorWarning]:
        """About the model that is served."""
        models = self.monitor().models
        return models[0].warnings if models else []

    async def _run(self) -> None:
        while True:
            try:
                if not self._is_alone:
                    self._others = await asyncio.to_thread(self._exchange, self._monitor.live())
                self._tell()
                await asyncio.to_thread(self._log.flush)
            except Exception as error:  # whatever it is must not end the telling for good
                logger.warning("metrics could not be told: %s", type(error).__name__)
            await asyncio.sleep(_TICK_S)

    def _tell(self) -> None:
        self._recorder.flush()
        self._recorder.gauge(metrics.QUEUED_TOKENS, self._queued_tokens(), self._sender)
        self._recorder.gauge(metrics.REPLICAS, self._num_replicas)
        for index, model in enumerate(self.monitor().models):
            self._tell_model(model, is_served=index == 0)

    def _tell_model(self, model: MonitoredModel, *, is_served: bool) -> None:
        label = model.model_version.partition(":")[2][:_SHOWN_DIGITS]
        self._recorder.gauge(metrics.MODEL, float(is_served), label)
        for metric, value in (
            (metrics.REWARD_MEAN, model.mean),
            (metrics.REWARD_STD, model.std),
            (metrics.REWARD_DRIFT, model.drift),
            (metrics.REWARD_LENGTH, model.length_correlation),
            (metrics.REWARD_EXTREMES, model.share_at_extremes),
        ):
            if value is not None:
                self._recorder.gauge(metric, value, label)
        warned = {warning.type for warning in model.warnings}
        for type_ in ("drift", "length", "extremes"):
            self._recorder.gauge(metrics.REWARD_WARNING, float(type_ in warned), label, type_)

    def _exchange(self, live: dict[str, LiveRewards]) -> list[dict[str, LiveRewards]]:
        """Leave what this ingress has seen for the others, and take what they have left."""
        now = time.time()
        own = f"{self._prefix}{self._sender}"
        told = json.dumps({"time": now, "live": dump(live)})
        kv_put(own, told)
        found = []
        for key in kv_keys(self._prefix):
            value = None if key == own.encode() else kv_get(key)
            if value is None:
                continue
            theirs = json.loads(value)
            age = now - theirs["time"]
            if age < _FRESH_S:
                found.append(load(theirs["live"]))
            elif age > _GONE_S:
                kv_delete(key)
        return found
