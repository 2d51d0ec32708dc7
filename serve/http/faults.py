"""What happens to an exception that nobody expected: a 500, and a log entry without its message.

A message may hold what the caller sent, and prompts have no place in a log. Left to itself, it
would be written there by Starlette, uvicorn and Ray Serve, each with the traceback.
"""

from __future__ import annotations

import logging
import traceback
from typing import TYPE_CHECKING

from starlette.requests import ClientDisconnect

from serve.errors import error_response
from serve.monitoring.request_log import CURRENT

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger("ray.serve")


class Faults:
    """Middleware around everything else."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_started = False

        async def noted(message: Message) -> None:
            nonlocal has_started
            has_started = True
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except ClientDisconnect:  # before its body was here: there is nobody to answer
            if (answered := CURRENT.get()) is not None:
                answered.hung_up()
        except Exception as error:  # what it says goes nowhere, whatever it is
            logger.error("a request failed by a fault of the service: %s", described(error))
            if has_started:
                raise RuntimeError("the reply broke off") from None
            message = f"{type(error).__name__} in the service; its log says more"
            await error_response("internal", message)(scope, receive, send)


def described(error: BaseException) -> str:
    """The types of an exception and its causes, and the places in the code: no values."""
    lines: list[str] = []
    link: BaseException | None = error
    while link is not None and len(lines) < 100:
        lines.append(type(link).__name__)
        for frame in traceback.extract_tb(link.__traceback__):
            lines.append(f"  {frame.filename}:{frame.lineno} in {frame.name}")
        link = link.__cause__ or link.__context__
    return "\n".join(lines)
