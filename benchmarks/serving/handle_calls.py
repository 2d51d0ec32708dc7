"""Calls through a Ray handle from a driver, one after the other: JSON on stdout.

    python -m benchmarks.serving.handle_calls 127.0.0.1:6379 --duration-s 10

It joins the cluster that `rayward serve` named and scores four tokens a call.
"""

from __future__ import annotations

import argparse
import json
import time

from benchmarks.common.arguments import positive_float, seconds
from benchmarks.serving.load import percentile


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("address", help="HOST:PORT of the cluster")
    parser.add_argument("--warm-up-s", type=seconds, default=2.0)
    parser.add_argument("--duration-s", type=positive_float, default=10.0)
    args = parser.parse_args()
    from serve.haproxy import settings

    settings.enable()
    from reward_actor.client.handle import RewardHandle
    from reward_actor.cluster import connect
    from reward_actor.groups import Group

    connect(0, address=args.address, log_to_driver=False)
    handle = RewardHandle()
    group = Group(prompt_ids=[5, 6], completion_ids=[[7, 8]])
    begin = time.monotonic() + args.warm_up_s
    latencies: list[float] = []
    while (start := time.monotonic()) < begin + args.duration_s:
        [scores] = handle.score_groups([group])
        assert scores.errors == [None]
        if start >= begin:
            latencies.append(1e3 * (time.monotonic() - start))
    latencies.sort()
    figures = {
        "num_requests": len(latencies),
        "statuses": {"200": len(latencies)},
        "requests_per_s": len(latencies) / args.duration_s,
        "p50_ms": percentile(latencies, 0.50),
        "p90_ms": percentile(latencies, 0.90),
        "p99_ms": percentile(latencies, 0.99),
        "max_ms": latencies[-1],
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
