"""vLLM's pooling server as verl and OpenAI's client call it: /classify, /pooling, /v1/embeddings.

Where it differs from vLLM 0.32 on the same export, on purpose:
- A conversation (`messages`) ends at the end token of its last turn, where the reward was trained
  to be read; vLLM reads it after whatever else its template writes there (a newline, for most). The
  same goes for templated text that ends with that.
- What would change a conversation under the model is refused, not ignored: another chat template, a
  generation prompt, a turn left open, tokens added or cut.
- `use_activation: true` is a sigmoid, which vLLM leaves out for our exports; without it both answer
  the reward itself. `task: "token_classify"` needs no other server.

A model name that is not the service's is a 404, as there; the model's directory is such a name,
since it is what vLLM calls a model that was given no other.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal
from uuid import uuid4

import numpy as np
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from reward_actor import schema
from serve.http.auth import ScoreRoute
from serve.http.requests import json_body, parse, service_of
from serve.ingress.service import RewardService, Scored
from serve.protocols.drop_in import (
    check_drop_in_model,
    drop_in_reply,
    num_tokens,
    sigmoid,
    token_values,
    values,
)
from serve.protocols.vllm_request import VllmPoolingRequest, VllmRequest, to_group

router = APIRouter(tags=["vLLM"], route_class=ScoreRoute)


class Usage(BaseModel):
    prompt_tokens: int
    total_tokens: int
    completion_tokens: Literal[0]


class _ListReply(BaseModel):
    id: str
    object: Literal["list"]
    created: int
    model: str
    usage: Usage


class ClassifyItem(BaseModel):
    index: int
    label: Literal["reward"]
    probs: list[float]
    num_classes: Literal[1]


class ClassifyReply(_ListReply):
    data: list[ClassifyItem]


class PoolingItem(BaseModel):
    """`data`: one value, one for each token, or (base64) float32 in little-endian bytes."""

    index: int
    object: Literal["pooling"]
    data: list[float] | list[list[float]] | str


class PoolingReply(_ListReply):
    data: list[PoolingItem]


class EmbeddingItem(BaseModel):
    index: int
    object: Literal["embedding"]
    embedding: list[float] | str


class EmbeddingsReply(_ListReply):
    data: list[EmbeddingItem]


async def classify(service: RewardService, request: VllmRequest) -> Response:
    """What `POST /classify` answers to vLLM's clients."""

    def item(index: int, value: float) -> dict[str, Any]:
        return {"index": index, "label": "reward", "probs": [value], "num_classes": 1}

    scored, found = await _score(service, request)
    return _reply(scored, "classify", found, item)


@router.post(
    "/pooling",
    response_model=PoolingReply,
    responses=schema.ERROR_RESPONSES,
    openapi_extra=json_body(VllmPoolingRequest),
)
async def pooling(request: Request) -> Response:
    """Score texts, token ids or a conversation; or every token of them."""
    service = service_of(request)
    asked = parse(VllmPoolingRequest, await request.body())

    def item(index: int, data: Any) -> dict[str, Any]:
        return {"index": index, "object": "pooling", "data": _encoded(data, asked)}

    if asked.task == "token_classify":
        await check_drop_in_model(service, asked.model)
        scored = await service.score([to_group(asked)], token_rewards=True)
        rows = token_values(service, scored)
        columns = [[[_activated(value, asked)] for value in row] for row in rows]
        return _reply(scored, "pooling", columns, item)
    scored, found = await _score(service, asked)
    return _reply(scored, "pooling", [[value] for value in found], item)


@router.post(
    "/v1/embeddings",
    response_model=EmbeddingsReply,
    responses=schema.ERROR_RESPONSES,
    openapi_extra=json_body(VllmRequest),
)
async def embeddings(request: Request) -> Response:
    """Score texts, token ids or a conversation; the embedding is the reward alone."""
    service = service_of(request)
    asked = parse(VllmRequest, await request.body())

    def item(index: int, value: float) -> dict[str, Any]:
        return {"index": index, "object": "embedding", "embedding": _encoded([value], asked)}

    scored, found = await _score(service, asked)
    return _reply(scored, "embd", found, item)


async def _score(service: RewardService, request: VllmRequest) -> tuple[Scored, list[float]]:
    await check_drop_in_model(service, request.model)
    scored = await service.score([to_group(request)])
    return scored, [_activated(value, request) for value in values(service, scored)]


def _activated(value: float, request: VllmRequest) -> float:
    return sigmoid(value) if request.is_activated else value


def _encoded(data: list[Any], request: VllmRequest) -> list[Any] | str:
    if request.encoding_format == "float":
        return data
    return base64.b64encode(np.array(data, "<f4").tobytes()).decode("ascii")


def _reply(
    scored: Scored,
    kind: str,
    found: Sequence[Any],
    item: Callable[[int, Any], dict[str, Any]],
) -> Response:
    body = {
        "id": f"{kind}-{uuid4().hex}",
        "object": "list",
        "created": int(time.time()),
        "model": scored.model.name,
        "data": [item(index, value) for index, value in enumerate(found)],
        "usage": usage(scored),
    }
    return drop_in_reply(body, scored)


def usage(scored: Scored) -> dict[str, int]:
    """The tokens that were scored, as OpenAI's protocols count them."""
    total = sum(num_tokens(scored.results))
    return {"prompt_tokens": total, "total_tokens": total, "completion_tokens": 0}
