"""The service's ASGI application without Ray, asked without a network."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx

from serve.api import build_api
from serve.config import ServeConfig
from serve.ingress.service import RewardService
from serve.ingress.swap import Swapper


def application(**settings: Any) -> Any:
    """The real application of an ingress that has no replicas."""
    config = ServeConfig(model="nowhere", **settings)
    no_handle: Any = None
    service = RewardService(config, no_handle, "test", "test")
    return build_api(service, Swapper(service.replicas, "rayward", config))


def ask(api: Any, method: str, path: str, **given: Any) -> httpx.Response:
    async def once() -> httpx.Response:
        transport = httpx.ASGITransport(api)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return await client.request(method, path, **given)

    return asyncio.run(once())
