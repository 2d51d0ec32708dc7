"""Other systems' routes that a reward model has no answer for, and what there is instead."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.exceptions import HTTPException

from serve.errors import answer_http_error

if TYPE_CHECKING:
    from fastapi import Request, Response

_PREFIXES = ("", "/v1", "/v2")  # that some systems have them behind

ABSENT = {
    ("/score", "/rerank"): "a reward model compares no texts; POST /v1/score scores the "
    "completions of a prompt",
    ("/embed", "/embed_all", "/embed_sparse", "/similarity", "/encode"): "a reward model has no "
    "embeddings; POST /classify scores texts or token ids",
    ("/generate", "/completions", "/responses"): "a reward model generates no text; POST /classify "
    "scores it",
    ("/tokenize", "/detokenize", "/decode"): "the tokenizer is not served; it is in the model's "
    "directory",
}


async def answer_no_route(request: Request, error: Exception) -> Response:
    """A 404 that says what to call instead."""
    assert isinstance(error, HTTPException)
    path = request.scope["path"].removeprefix(request.scope.get("root_path", ""))
    reason = next(
        (
            said
            for routes, said in ABSENT.items()
            if any(path == prefix + route for route in routes for prefix in _PREFIXES)
        ),
        None,
    )
    known = "/docs lists the routes that there are"
    message = f"no such route; {known}" if reason is None else f"no such route: {reason}; {known}"
    return answer_http_error(request, HTTPException(404, message))
