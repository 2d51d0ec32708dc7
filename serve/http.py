"""The FastAPI application without its routes: errors as the protocol words them, body limit."""

from __future__ import annotations

import json
import math
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from reward_actor.errors import RewardServiceError
from reward_actor.schema import error_reply

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send


_TYPE_OF_STATUS = {404: "not_found", 413: "body_too_large"}


def build_api() -> FastAPI:
    api = FastAPI(
        title="Rayward",
        summary="Rewards of completions, for PPO and GRPO trainers.",
        version=_version(),
    )
    api.add_exception_handler(RewardServiceError, _service_error)
    api.add_exception_handler(RequestValidationError, _invalid)
    api.add_exception_handler(HTTPException, _http_error)
    api.add_exception_handler(Exception, _our_bug)
    api.add_middleware(BodyLimit, api=api)
    return api


class BodyLimit:
    """Refuses a body above `api.state.body_limit_bytes`, announced or not, with status 413."""

    def __init__(self, app: ASGIApp, api: FastAPI) -> None:
        self._app = app
        self._api = api

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        limit = getattr(self._api.state, "body_limit_bytes", None)
        if scope["type"] != "http" or limit is None:
            await self._app(scope, receive, send)
            return
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if announced.isdigit() and int(announced) > limit:
            message = f"the body is larger than body_limit_bytes = {limit}"
            await _reply("body_too_large", message)(scope, receive, send)
            return
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > limit:
                # FastAPI turns any other exception of its body's reading into a 400.
                raise HTTPException(413, f"the body is larger than body_limit_bytes = {limit}")
            return message

        await self._app(scope, counted, send)


def _service_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RewardServiceError)
    return _reply(error.type, error.message, index=error.index, retry_after_s=error.retry_after_s)


def _invalid(request: Request, error: Exception) -> Response:
    """What is wrong and where, never the input: it may hold a NaN, a lone surrogate, a prompt."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = [part for part in first["loc"] if part != "body"]
    shown = ".".join(str(part)[:64] for part in place)
    indices = [part for part in place if isinstance(part, int)]
    message = f"{shown}: {first['msg']}" if shown else str(first["msg"])
    return _reply("invalid_request", message, index=indices[0] if indices else None)


def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    type_ = _TYPE_OF_STATUS.get(error.status_code, "invalid_request")
    response = _reply(type_, str(error.detail))
    if error.status_code != 400:  # FastAPI's for a body that is not JSON: as invalid as any other
        response.status_code = error.status_code
    for name, value in (error.headers or {}).items():
        response.headers[name] = value
    return response


def _our_bug(request: Request, error: Exception) -> Response:
    """Starlette logs the exception; the caller learns only that it was not his fault."""
    return _reply("internal", f"{type(error).__name__} in the service; its log says more")


def _reply(
    type_: Any, message: str, *, index: int | None = None, retry_after_s: float | None = None
) -> Response:
    status, body = error_reply(type_, message, index=index)
    headers = {}
    if retry_after_s is not None:
        headers["Retry-After"] = str(max(1, math.ceil(retry_after_s)))
    # ASCII only: a message may name a key of the request that is not valid Unicode.
    text = json.dumps(body, ensure_ascii=True)
    return Response(text, status, headers, "application/json")


def _version() -> str:
    try:
        return version("rayward")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "0"
