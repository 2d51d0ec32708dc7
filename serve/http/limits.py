"""What an ingress takes in at most: requests at once, bytes, time for a body."""

from __future__ import annotations

import asyncio
import zlib
from typing import TYPE_CHECKING

from starlette.exceptions import HTTPException

from serve.errors import error_response

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from serve.config import ServeConfig

_SERVICE_HEADER = b"x-rayward-service"
_FULL_RETRY_AFTER_S = 1.0
_GZIP = {b"gzip": True, b"x-gzip": True, b"identity": False, b"": False}
_GZIP_WBITS = 31  # the format with gzip's header and checksum
_NO_GZIP = "the body is not what its Content-Encoding says: one whole gzip stream"
# Inflated at once; other requests have their turn in between.
_PIECE_BYTES = 1 << 20
# Answered in any case: an ingress that is busy is alive.
_PROBES = ("/health", "/live", "/ready")


class OwnRequests:
    """Refuses what the HAProxy of another service sends: to the port of its ingress that died.

    The client tries again, and its service has found another ingress by then.
    """

    def __init__(self, app: ASGIApp, name: str | None) -> None:
        self._app = app
        self._name = None if name is None else name.encode("ascii")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._name is not None:
            meant = next((v for k, v in scope["headers"] if k == _SERVICE_HEADER), self._name)
            if meant != self._name:
                message = "this ingress belongs to another service; try again"
                await error_response("unavailable", message)(scope, receive, send)
                return
        await self._app(scope, receive, send)


class Limits:
    """Refuses what is too much before it costs anything, and hands a body on in one piece.

    A body is read when the application asks for it, so after its route has checked the token.
    """

    def __init__(self, app: ASGIApp, config: ServeConfig) -> None:
        self._app = app
        self._body_limit_bytes = config.body_limit_bytes
        self._max_requests = config.max_concurrent_requests
        self._timeout_s = config.request_timeout_s
        self._num_requests = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if self._num_requests >= self._max_requests and not scope["path"].endswith(_PROBES):
            message = f"{self._max_requests} requests are under way here; try again soon"
            reply = error_response("overloaded", message, retry_after_s=_FULL_RETRY_AFTER_S)
            await reply(scope, receive, send)
            return
        self._num_requests += 1
        try:
            await self._app(scope, self._whole_body(scope, receive), send)
        finally:
            self._num_requests -= 1

    def _whole_body(self, scope: Scope, receive: Receive) -> Receive:
        """Of a request: what its body's chunks make together, or an HTTPException.

        FastAPI would turn any other exception into a 400 if it is what reads the body.
        """
        headers = dict(scope["headers"])
        is_read = False

        async def received() -> Message:
            nonlocal is_read
            if is_read:  # nothing comes after the body, but for the end of the connection
                return await receive()
            is_read = True
            is_gzip = self._check_headers(headers)
            try:
                async with asyncio.timeout(self._timeout_s):
                    body = await self._body(receive)
                    if body is not None and is_gzip:
                        body = await self._inflated(body)
            except TimeoutError:
                message = f"the body did not arrive within request_timeout_s = {self._timeout_s:g}"
                raise HTTPException(408, message) from None
            if body is None:
                return {"type": "http.disconnect"}
            return {"type": "http.request", "body": body, "more_body": False}

        return received

    def _check_headers(self, headers: dict[bytes, bytes]) -> bool:
        """Whether the body is compressed."""
        is_gzip = _GZIP.get(headers.get(b"content-encoding", b"").lower())
        if is_gzip is None:
            message = "a body may be compressed by gzip only; send it so, or without an encoding"
            raise HTTPException(415, message, headers={"Accept-Encoding": "gzip"})
        announced = headers.get(b"content-length", b"0")
        if announced.isdigit() and int(announced) > self._body_limit_bytes:
            raise self._too_large()
        return is_gzip

    async def _body(self, receive: Receive) -> bytes | None:
        """None for a client that hung up."""
        chunks: list[bytes] = []
        num_bytes = 0
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            chunk = message.get("body", b"")
            num_bytes += len(chunk)
            if num_bytes > self._body_limit_bytes:
                raise self._too_large()
            chunks.append(chunk)
            more = message.get("more_body", False)
        return b"".join(chunks)

    async def _inflated(self, compressed: bytes) -> bytes:
        """The body that was compressed; the limit holds for it as well."""
        inflate = zlib.decompressobj(_GZIP_WBITS)
        pieces: list[bytes] = []
        left, at = self._body_limit_bytes, 0
        while not inflate.eof:
            # It hands back what it has not taken yet: of a slice, that is never the whole rest.
            rest = inflate.unconsumed_tail
            if not rest:
                rest = compressed[at : at + _PIECE_BYTES]
                at += len(rest)
            try:
                piece = inflate.decompress(rest, min(_PIECE_BYTES, left + 1))
            except zlib.error:
                raise HTTPException(400, _NO_GZIP) from None
            if len(piece) > left:
                raise self._too_large()
            if not piece and not rest:  # it wants more than there is
                raise HTTPException(400, _NO_GZIP)
            left -= len(piece)
            pieces.append(piece)
            await asyncio.sleep(0)
        if inflate.unused_data or at < len(compressed):
            raise HTTPException(400, _NO_GZIP)
        return b"".join(pieces)

    def _too_large(self) -> HTTPException:
        message = f"the body is larger than body_limit_bytes = {self._body_limit_bytes}"
        return HTTPException(413, message)
