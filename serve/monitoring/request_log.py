"""Every HTTP request in a line of JSON and in the metrics, under the id that its client gave it.

A line holds who asked for what (an id, a route's template), how it went and how much it was; never
a word or a token id of what was asked.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
import uuid
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reward_actor.schema import HTTP_STATUS
from serve.errors import ERROR_HEADER

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

_ID_HEADER = b"x-request-id"
_SANE_ID = re.compile(rb"[A-Za-z0-9_-]{1,64}")
# What nginx calls a request whose client hung up before it was answered.
_HUNG_UP = 499
_MAX_FILE_BYTES = 100 * 2**20

_TYPES = {status: type_ for type_, status in reversed(HTTP_STATUS.items())}


@dataclass
class Answered:
    """One HTTP request, once it is over; what was scored for it, if anything was.

    Until its response starts it is as if it failed.
    """

    request_id: str
    route: str = "other"
    status: int = 500
    error_type: str | None = "internal"
    seconds: float = 0.0
    num_samples: int = 0
    num_tokens: int = 0
    model_version: str | None = None

    def hung_up(self) -> None:
        """Its client went away before it was answered, which is nobody's error."""
        self.status, self.error_type = _HUNG_UP, None


CURRENT: ContextVar[Answered | None] = ContextVar("CURRENT", default=None)
"""The HTTP request that this task answers."""


class RequestLog:
    """Gives every request an id, and tells `on_answer` how it ended. The outermost middleware.

    Ray Serve gives a request without an id one, and sends either back. Where it passes on an id
    that is not sane (its HAProxy drops those), one of ours stands beside it in the answer.
    """

    def __init__(self, app: ASGIApp, on_answer: Callable[[Answered], None]) -> None:
        self._app = app
        self._on_answer = on_answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(_ID_HEADER, b"")
        is_sane = _SANE_ID.fullmatch(given) is not None
        answered = Answered(given.decode() if is_sane else uuid.uuid4().hex)

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                answered.status = message["status"]
                answered.error_type = _error_type(message)
                if not is_sane:
                    made = (_ID_HEADER, answered.request_id.encode())
                    message["headers"] = [*message["headers"], made]
            await send(message)

        started = time.perf_counter()
        token = CURRENT.set(answered)
        try:
            await self._app(scope, receive, noted)
        except asyncio.CancelledError:
            answered.hung_up()
            raise
        finally:
            CURRENT.reset(token)
            answered.seconds = time.perf_counter() - started
            # The router leaves there which of its routes it was.
            answered.route = getattr(scope.get("route"), "path", "other")
            self._on_answer(answered)


def _error_type(message: Message) -> str | None:
    if message["status"] < 400:
        return None
    told = dict(message["headers"]).get(ERROR_HEADER.encode())
    return _TYPES.get(message["status"], "invalid_request") if told is None else told.decode()


def json_line(answered: Answered) -> str:
    line: dict[str, Any] = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "request_id": answered.request_id,
        "route": answered.route,
        "status": answered.status,
        "ms": round(1e3 * answered.seconds, 3),
        "samples": answered.num_samples,
        "tokens": answered.num_tokens,
        "model_version": answered.model_version,
    }
    if answered.error_type is not None:
        line["error"] = answered.error_type
    return json.dumps(line)


class LogFile:
    """Lines of JSON in a file, which is begun anew before it grows too large; one is kept.

    A line costs a request nothing but itself: `flush` writes them, and a failure of our own (a
    status of 500 and more) does so at once.
    """

    def __init__(self, file: Path | None, *, every_request: bool) -> None:
        """file: none for no lines; every_request: not only those that failed by our own fault."""
        self._file = file
        self._every_request = every_request
        self._lines: list[str] = []

    def add(self, answered: Answered) -> None:
        if self._file is None:
            return
        is_ours = answered.status >= 500
        if self._every_request or is_ours:
            self._lines.append(json_line(answered) + "\n")
        if is_ours:
            self.flush()

    def flush(self) -> None:
        lines, self._lines = self._lines, []
        if not lines or self._file is None:
            return
        with self._file.open("a", encoding="utf-8") as file:
            file.writelines(lines)
            size = file.tell()
        if size > _MAX_FILE_BYTES:
            self._file.replace(self._file.with_suffix(".old.jsonl"))
