"""A peer: one Ray Serve deployment with `@serve.batch`, everything else as Ray's defaults are.

    python -m benchmarks.serving.baselines.plain_ray_serve MODEL --port 8000

What a user would write after Ray's documentation on batching: a batch of up to 16 requests that
waits 10 ms for more, a model of transformers, and room for all clients of the benchmark at once
(Ray's own five would never fill one). `POST /` with {"texts": [..]} or {"input_ids": [[..], ..]}.
"""

from __future__ import annotations

import argparse
import threading
from typing import TYPE_CHECKING, Any

import ray
from ray import serve

from benchmarks.serving.baselines.plain_model import PlainModel

if TYPE_CHECKING:
    from starlette.requests import Request

_BATCH_SIZE = 16
_BATCH_WAIT_S = 0.01
_ONGOING_REQUESTS = 128


@serve.deployment(max_ongoing_requests=_ONGOING_REQUESTS)
class PlainReward:
    """Scores what is asked for in one batch after the other, each request's sequences together."""

    def __init__(self, directory: str, dtype: str, threads: int) -> None:
        self._model = PlainModel(directory, dtype, threads)

    @serve.batch(max_batch_size=_BATCH_SIZE, batch_wait_timeout_s=_BATCH_WAIT_S)
    async def score(self, requests: list[list[list[int]]]) -> list[list[float]]:
        rewards = iter(self._model.score([ids for sequences in requests for ids in sequences]))
        return [[next(rewards) for _ in sequences] for sequences in requests]

    async def __call__(self, request: Request) -> dict[str, Any]:
        if request.method == "GET":
            return {"status": "ok"}
        body = await request.json()
        sequences = body.get("input_ids") or self._model.encode(body["texts"])
        return {"rewards": await self.score(sequences)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": args.port})
    deployment: Any = PlainReward
    serve.run(deployment.bind(args.model, args.dtype, args.threads))
    threading.Event().wait()


if __name__ == "__main__":
    main()
