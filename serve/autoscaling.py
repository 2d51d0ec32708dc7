"""How many replicas: as many as work off what waits within the time that it should wait.

A policy for Ray Serve's autoscaler, which runs it in its controller. The replicas report
`queued_tokens` (their own and what waits at the ingresses) and `tokens_per_s`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext


def wanted_replicas(
    queued_tokens: float, tokens_per_s: float, target_queue_s: float, num_requests: float
) -> int:
    """The replicas for a queue of so many tokens, when each scores `tokens_per_s`.

    At least one while anybody asks for anything, none when nobody does.
    """
    if queued_tokens <= 0:
        return 1 if num_requests > 0 else 0
    return max(1, math.ceil(queued_tokens / (max(tokens_per_s, 1.0) * target_queue_s)))


class QueuedTokensPolicy:
    """Called by Ray Serve with what is known of a deployment; returns the replicas that it needs.

    Ray bounds them by min and max, and by the delays of the configuration.
    """

    def __init__(self, target_queue_s: float) -> None:
        self._target_queue_s = target_queue_s

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        metrics = context.aggregated_metrics or {}
        queued = metrics.get("queued_tokens") or {}
        rates = metrics.get("tokens_per_s") or {}
        # Every replica hears of all that waits at an ingress: the largest report is the queue.
        queued_tokens = max(queued.values(), default=0.0)
        tokens_per_s = sum(rates.values()) / len(rates) if rates else 1.0
        wanted = wanted_replicas(
            queued_tokens, tokens_per_s, self._target_queue_s, context.total_num_requests
        )
        return wanted, {}
