"""The service's metrics, through Ray: what there is, and how it is recorded cheaply.

Every node of the cluster shows those of its processes to Prometheus, under these names with `ray_`
in front; `targets` says where. Labels never hold anything that a caller wrote.

A counter of Ray takes 2 to 4 microseconds and a sum in a dictionary 0.07, so counts are summed up
here and handed over by `flush`. A gauge that is not set again vanishes after half a minute.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

from reward_actor.ray_internals import session_dir

_SECONDS = [0.001 * 2**power for power in range(18)]  # one millisecond to two minutes
_TOKENS = [float(2**power) for power in range(6, 21)]  # 64 to a million

# Ray writes a file of this name for a cluster with a dashboard, which ours is without.
_TARGETS_FILE = "prom_metrics_service_discovery.json"


@dataclass(frozen=True)
class Metric:
    """What Ray is told of a metric; the labels' values are given in this order."""

    kind: Literal["counter", "gauge", "histogram"]
    name: str
    description: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()

    @property
    def shown(self) -> list[str]:
        """The names that Prometheus sees."""
        name = f"ray_{self.name}"
        return [f"{name}_{end}" for end in ("bucket", "count", "sum")] if self.buckets else [name]


def _counter(name: str, description: str, *labels: str) -> Metric:
    assert name.endswith("_total"), "Prometheus would see it under another name"
    return Metric("counter", f"rayward_{name}", description, labels)


def _gauge(name: str, description: str, *labels: str) -> Metric:
    return Metric("gauge", f"rayward_{name}", description, labels)


def _histogram(name: str, buckets: list[float], description: str, *labels: str) -> Metric:
    return Metric("histogram", f"rayward_{name}", description, labels, tuple(buckets))


# ---- of an ingress

REQUESTS = _counter("requests_total", "HTTP requests answered.", "route", "status")
REJECTIONS = _counter("rejections_total", "Requests refused or failed.", "type")
SAMPLES = _counter("samples_total", "Samples scored.")
SAMPLE_ERRORS = _counter("sample_errors_total", "Samples without a reward.", "type")
ERROR_REWARDS = _counter(
    "error_rewards_total", "Samples answered with error_reward, without a reward.", "type"
)
TOKENS = _counter("tokens_total", "Tokens of the samples scored, each counted in full.")
COMPUTED_TOKENS = _counter("computed_tokens_total", "Tokens computed, shared prefixes once.")
SAVED_TOKENS = _counter("saved_tokens_total", "Tokens not computed, as their prefix is shared.")
SWAPS = _counter("swaps_total", "Hot swaps asked for.", "outcome")
LATENCY = _histogram(
    "latency_seconds", _SECONDS, "Of a request: render, queue, score, total.", "stage"
)
QUEUED_TOKENS = _gauge("queued_tokens", "Tokens that wait at or behind an ingress.", "replica")
REPLICAS = _gauge("replicas", "Reward model replicas that answer.")
MODEL = _gauge("model_info", "1 for the model version that is served.", "model_version")
REWARD_MEAN = _gauge("reward_mean", "Of the live rewards.", "model_version")
REWARD_STD = _gauge("reward_std", "Of the live rewards.", "model_version")
REWARD_DRIFT = _gauge(
    "reward_drift", "Population stability index against held-out rewards.", "model_version"
)
REWARD_LENGTH = _gauge(
    "reward_length_correlation", "Pearson's, of reward and number of tokens.", "model_version"
)
REWARD_EXTREMES = _gauge(
    "reward_share_at_extremes", "Of live rewards, where 2 % of held-out ones are.", "model_version"
)
REWARD_WARNING = _gauge(
    "reward_warning", "1 while the live rewards are warned about.", "model_version", "type"
)

# ---- of a reward model replica

BATCH_TOKENS = _histogram("batch_tokens", _TOKENS, "Tokens computed in one batch.")
BATCH_SECONDS = _histogram("batch_seconds", _SECONDS, "Time on the device of one batch.")
TOKENS_PER_S = _gauge("replica_tokens_per_second", "While a batch runs.", "replica")
REPLICA_QUEUE = _gauge("replica_queued_tokens", "Tokens that wait at a replica.", "replica")

METRICS: tuple[Metric, ...] = tuple(
    value for value in list(globals().values()) if isinstance(value, Metric)
)

Labels = tuple[str, ...]


class Recorder:
    """The metrics of one process. Use from one thread."""

    def __init__(self) -> None:
        self._counts: dict[tuple[Metric, Labels], float] = {}
        self._made: dict[Metric, Any] = {}

    def count(self, metric: Metric, amount: float = 1, *labels: str) -> None:
        """Handed to Ray by the next `flush`."""
        key = (metric, labels)
        self._counts[key] = self._counts.get(key, 0) + amount

    def observe(self, metric: Metric, value: float, *labels: str) -> None:
        self._ray(metric).observe(value, dict(zip(metric.labels, labels, strict=True)))

    def gauge(self, metric: Metric, value: float, *labels: str) -> None:
        self._ray(metric).set(value, dict(zip(metric.labels, labels, strict=True)))

    def flush(self) -> None:
        counts, self._counts = self._counts, {}
        for (metric, labels), amount in counts.items():
            if amount > 0:
                self._ray(metric).inc(amount, dict(zip(metric.labels, labels, strict=True)))

    def _ray(self, metric: Metric) -> Any:
        made = self._made.get(metric)
        if made is None:
            made = self._made[metric] = _make(metric)
        return made


def _make(metric: Metric) -> Any:
    from ray.util.metrics import Counter, Gauge, Histogram

    given = (metric.name, metric.description)
    if metric.kind == "counter":
        return Counter(*given, tag_keys=metric.labels)
    if metric.kind == "gauge":
        return Gauge(*given, tag_keys=metric.labels)
    return Histogram(*given, boundaries=list(metric.buckets), tag_keys=metric.labels)


def targets() -> list[str]:
    """host:port of every node of this process's cluster: http://HOST:PORT/metrics has them all."""
    import ray

    return [
        f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}"
        for node in ray.nodes()
        if node["Alive"] and node["MetricsExportPort"] > 0
    ]


def publish_targets() -> None:
    """Write the file that Prometheus finds them by, where Ray does not (a cluster of our own)."""
    folder = session_dir()
    if folder is None:  # connected from outside: not our file to write
        return
    file = folder / _TARGETS_FILE
    if not file.exists():
        file.write_text(json.dumps([{"labels": {"job": "ray"}, "targets": targets()}]))
