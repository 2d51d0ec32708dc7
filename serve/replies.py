"""An error of the vocabulary in `reward_actor.schema` as an HTTP response."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

from starlette.responses import Response

from reward_actor.schema import ErrorType, error_reply

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
