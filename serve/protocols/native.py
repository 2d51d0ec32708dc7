"""The native protocol, `POST /v1/score`: JSON (`reward_actor.schema`), and a compact binary body
for token ids (`reward_actor.binary`); and how one reward comes about, `POST /v1/explain`."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response

from reward_actor import binary, schema
from reward_actor.errors import RewardServiceError
from reward_actor.groups import Group, GroupScores, Whole
from serve.http.auth import ScoreRoute
from serve.http.requests import json_body, json_reply, parse, service_of
from serve.ingress.service import RewardService

router = APIRouter(tags=["score"], route_class=ScoreRoute)


@router.post(
    "/v1/explain",
    response_model=schema.ExplainReply,
    responses=schema.ERROR_RESPONSES,
    openapi_extra=json_body(schema.ExplainRequest),
)
async def explain(request: Request) -> schema.ExplainReply:
    """One completion token by token, which token is read, and what makes its reward: what `rayward
    score --explain` prints."""
    asked = parse(schema.ExplainRequest, await request.body())
    return await service_of(request).explain(to_group(asked))


async def score_json(service: RewardService, request: schema.ScoreRequest) -> Response:
    await check_model(service, request.model)
    groups = [to_group(group) for group in request.groups]
    scored = await service.score(
        groups, token_rewards=request.token_rewards, turn_rewards=request.turn_rewards
    )
    return json_reply(
        {
            "model": scored.model.name,
            "model_version": scored.model_version,
            "results": [to_reply(score) for score in scored.results],
            "timings_ms": {name: round(ms, 3) for name, ms in scored.timings_ms.items()},
        }
    )


async def score_binary(service: RewardService, body: bytes) -> Response:
    try:
        groups, token_rewards = binary.decode_request(body)
    except ValueError as error:
        raise RequestValidationError([{"loc": ("body",), "msg": str(error)}]) from None
    scored = await service.score(groups, token_rewards=token_rewards)
    head = {"model_version": scored.model_version, "timings_ms": scored.timings_ms}
    reply = binary.encode_reply(scored.model.name, scored.results, head)
    return Response(reply, media_type=binary.MEDIA_TYPE)


async def check_model(service: RewardService, name: str | None, *aliases: str) -> None:
    """Raise RewardServiceError unless this is what the service's model is called, or was when the
    service started (a hot swap turns no caller away), or an alias of its protocol."""
    if name in (None, service.config.name, *aliases):
        return
    model = await service.known_model()
    if name != model.name:
        names = " and ".join(map(repr, (*aliases, model.name)))
        raise RewardServiceError(
            "not_found", f"this service has no model of that name; it has {names}"
        )


def to_group(request: schema.GroupRequest) -> Group | Whole:
    if request.texts is not None:
        return Whole(request.texts)
    if request.prompt_ids is not None:
        return Group(prompt_ids=request.prompt_ids, completion_ids=request.completion_ids or [])
    assert request.prompt is not None
    prompt = request.prompt
    return Group(
        prompt if isinstance(prompt, str) else [message.as_message() for message in prompt],
        [
            said if isinstance(said, str) else said.as_message()
            for said in request.completions or []
        ],
        template_args=request.chat_template_kwargs or {},
        tools=request.tools or (),
    )


def to_reply(scores: GroupScores) -> dict[str, Any]:
    """As `schema.GroupReply`, whose validation would look at every number once more."""
    reply = scores.to_json()
    del reply["model_version"]
    return reply
