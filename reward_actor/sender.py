"""One request to the service, sent as often as it takes and to whom it takes, until the deadline.

Every request that is sent here may be sent again: scoring is a pure function, and a swap to the
model that is served already changes nothing.
"""

from __future__ import annotations

import asyncio
import copy
import time
from collections.abc import Callable, Sequence
from functools import partial

import httpx

from reward_actor import bodies
from reward_actor.endpoints import Endpoints
from reward_actor.errors import RewardServiceError
from reward_actor.transport import Verify, connect, unreachable


class Sender:
    """The connections of one client in one event loop."""

    def __init__(self, urls: Sequence[str], token: str | None, verify: Verify) -> None:
        """Raises ValueError as `connect` does."""
        self.endpoints = Endpoints(urls)
        make = partial(connect, token=token, verify=verify)
        self._connections = {url: make(url) for url in urls}

    async def send(
        self,
        method: str,
        path: str,
        body: bytes | None,
        media_type: str,
        deadline: float,
        on_failure: Callable[[RewardServiceError], None] = lambda _: None,
    ) -> httpx.Response:
        """The first reply with status 200. Raises RewardServiceError.

        deadline: of time.monotonic, for everything. on_failure: told of each attempt that failed
        and is followed by another.
        """
        failure: RewardServiceError | None = None
        while True:
            now = time.monotonic()
            pause_s = self.endpoints.pause_s(now, is_first=failure is None)
            if now + pause_s >= deadline:
                raise self.too_late(failure or self.endpoints.least_bad().error)
            if pause_s > 0:
                await asyncio.sleep(pause_s)
            result = await self._attempt(method, path, body, media_type, deadline)
            if isinstance(result, httpx.Response):
                return result
            failure = result
            on_failure(failure)

    async def _attempt(
        self, method: str, path: str, body: bytes | None, media_type: str, deadline: float
    ) -> httpx.Response | RewardServiceError:
        """The reply, or why to try again. Raises RewardServiceError where that is of no use."""
        started = time.monotonic()
        endpoint = self.endpoints.choose(started)
        try:
            async with asyncio.timeout(deadline - started):
                reply = await self._connections[endpoint.url].request(
                    method, path, content=body, headers={"Content-Type": media_type}
                )
        except TimeoutError:
            failure = self.too_late(None)
            self.endpoints.failed(endpoint, failure, started, time.monotonic())
            raise failure from None
        except httpx.TransportError as error:
            failure = unreachable(endpoint.url, error)
        else:
            if reply.status_code == 200:
                self.endpoints.succeeded(endpoint)
                return reply
            failure = bodies.error_of(endpoint.url, reply.status_code, reply.headers, reply.content)
        if not failure.retryable:
            raise failure
        self.endpoints.failed(endpoint, failure, started, time.monotonic())
        return failure

    def too_late(self, failure: RewardServiceError | None) -> RewardServiceError:
        """What a call ends with at its deadline: what kept it from ending well, if it is known."""
        if failure is not None:
            return copy.copy(failure)
        urls = ", ".join(endpoint.url for endpoint in self.endpoints.all)
        return RewardServiceError(
            "deadline_exceeded", f"no reply in time from {urls}", retryable=True
        )

    async def close(self) -> None:
        for connection in self._connections.values():
            await connection.aclose()
