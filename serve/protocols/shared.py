"""The paths that two protocols share; the keys of a body tell which of them it speaks."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from reward_actor import binary, schema
from serve.http.auth import ScoreRoute
from serve.http.requests import check, json_body, load, service_of
from serve.protocols import native, sglang, vllm
from serve.protocols.drop_in import told_apart
from serve.protocols.vllm_request import VllmRequest

router = APIRouter(route_class=ScoreRoute)

_SCORE = {"native": ("groups",), "SGLang's": ("query", "items")}
_CLASSIFY = {"vLLM's": ("input", "messages"), "SGLang's": ("text", "input_ids")}
_BINARY = {"schema": {"type": "string", "format": "binary", "description": binary.__doc__}}


@router.post(
    "/v1/score",
    tags=["score"],
    response_model=schema.ScoreReply | sglang.SglangScoreReply,
    responses=schema.ERROR_RESPONSES,
    openapi_extra=json_body(
        schema.ScoreRequest, sglang.SglangScoreRequest, others={binary.MEDIA_TYPE: _BINARY}
    ),
)
async def score(request: Request) -> Response:
    """Score the completions of one or more prompts: the native protocol, in JSON or in a compact
    body for token ids; or SGLang's."""
    service, body = service_of(request), await request.body()
    if request.headers.get("content-type") == binary.MEDIA_TYPE:
        return await native.score_binary(service, body)
    value = load(body)
    if told_apart(value, _SCORE) == "native":
        return await native.score_json(service, check(schema.ScoreRequest, value))
    return await sglang.score(service, check(sglang.SglangScoreRequest, value))


@router.post("/v1/classify", include_in_schema=False)  # where SGLang understands vLLM's body
@router.post(
    "/classify",
    tags=["vLLM", "SGLang"],
    response_model=vllm.ClassifyReply | list[sglang.SglangClassifyItem] | sglang.SglangClassifyItem,
    responses=schema.ERROR_RESPONSES,
    openapi_extra=json_body(VllmRequest, sglang.SglangClassifyRequest),
)
async def classify(request: Request) -> Response:
    """Score texts, token ids or a conversation, as vLLM (`input`, `messages`) or SGLang (`text`,
    `input_ids`) answers."""
    service, value = service_of(request), load(await request.body())
    if told_apart(value, _CLASSIFY) == "SGLang's":
        return await sglang.classify(service, check(sglang.SglangClassifyRequest, value))
    return await vllm.classify(service, check(VllmRequest, value))
