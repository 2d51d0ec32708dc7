"""A peer: FastAPI that runs the model inside `async def`, so one request at a time.

    python -m benchmarks.serving.baselines.one_at_a_time MODEL --port 5000

It is how OpenRLHF's script for a remote reward model works, and it speaks that script's protocol,
`POST /get_reward` (PROTOCOLS.md has it): text in, templated already.
"""

from __future__ import annotations

import argparse
from typing import Any

import uvicorn
from fastapi import FastAPI, Request

from benchmarks.serving.baselines.plain_model import PlainModel


def build(model: PlainModel) -> FastAPI:
    app = FastAPI()

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/get_reward")
    async def get_reward(request: Request) -> dict[str, Any]:
        body = await request.json()
        rewards = model.score(model.encode(body["query"]))
        return {"rewards": rewards, "scores": rewards, "extra_logs": {}}

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    model = PlainModel(args.model, args.dtype, args.threads)
    uvicorn.run(build(model), host="127.0.0.1", port=args.port, log_level="warning")


if __name__ == "__main__":
    main()
