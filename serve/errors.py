"""Errors as HTTP responses, in the vocabulary of `reward_actor.schema`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from reward_actor.errors import RewardServiceError
from reward_actor.schema import error_reply

if TYPE_CHECKING:
    from fastapi import Request

    from reward_actor.errors import ErrorType


ERROR_HEADER = "x-rayward-error"
"""The type of an error beside its status, for the log: one status may have several types."""


def error_response(
    type_: ErrorType,
    message: str,
    *,
    index: int | None = None,
    retry_after_s: float | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    status, body = error_reply(type_, message, index=index)
    sent = {ERROR_HEADER: type_, **(headers or {})}
    if retry_after_s is not None:
        sent["Retry-After"] = str(max(1, math.ceil(retry_after_s)))
    # ASCII only: a message may name a model whose name is not valid Unicode.
    text = json.dumps(body, ensure_ascii=True)
    return Response(text, status, sent, "application/json")


_TYPE_OF_STATUS: dict[int, ErrorType] = {
    404: "not_found",
    408: "deadline_exceeded",
    413: "body_too_large",
}


def answer_error(request: Request, error: Exception) -> Response:
    """How the service answers an error of a request, which is one of those handled here."""
    if isinstance(error, RewardServiceError):
        return answer_service_error(request, error)
    if isinstance(error, RequestValidationError):
        return answer_invalid(request, error)
    return answer_http_error(request, error)


def answer_service_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RewardServiceError)
    return error_response(
        cast("ErrorType", error.type),
        error.message,
        index=error.index,
        retry_after_s=error.retry_after_s,
    )


def answer_invalid(request: Request, error: Exception) -> Response:
    """What is wrong and where, never the input: it may hold a NaN, a lone surrogate, a prompt."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = [part for part in first["loc"] if part != "body"]
    shown = ".".join(map(str, place))
    indices = [part for part in place if isinstance(part, int)]
    message = f"{shown}: {first['msg']}" if shown else str(first["msg"])
    return error_response("invalid_request", message, index=indices[0] if indices else None)


def answer_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    type_ = _TYPE_OF_STATUS.get(error.status_code, "invalid_request")
    response = error_response(type_, str(error.detail))
    if error.status_code != 400:  # FastAPI's for a body that is not JSON: as invalid as any other
        response.status_code = error.status_code
    for name, value in (error.headers or {}).items():
        response.headers[name] = value
    return response
