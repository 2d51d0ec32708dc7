"""LLaMA-Factory's reward model API (`--reward_model URL --reward_model_type api`).

Its PPO trainer sends whole decoded texts, to which nothing is added, and always the model name
"model": the name is ignored. Its own server cuts what is too long for the model without a word;
here that is an error unless `max_length` asks for it.
"""

from __future__ import annotations

from typing import Annotated, Literal
from uuid import uuid4

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from reward_actor import schema
from reward_actor.groups import Whole
from serve.http.auth import ScoreRoute
from serve.http.requests import json_body, parse, service_of
from serve.protocols.drop_in import DropIn, drop_in_reply, values

router = APIRouter(tags=["LLaMA-Factory"], route_class=ScoreRoute)


class LlamaFactoryRequest(DropIn):
    """`max_length`: of longer texts the first so many tokens are scored."""

    messages: Annotated[list[str], Field(min_length=1)]
    max_length: Annotated[int, Field(ge=1)] | None = None

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "model": "model",
                    "messages": [
                        "<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>"
                    ],
                }
            ]
        }
    )


class LlamaFactoryReply(BaseModel):
    id: str
    object: Literal["score.evaluation"]
    model: str
    scores: list[float]


@router.post(
    "/v1/score/evaluation",
    response_model=LlamaFactoryReply,
    responses=schema.ERROR_RESPONSES,
    openapi_extra=json_body(LlamaFactoryRequest),
)
async def evaluation(request: Request) -> Response:
    """Score whole texts."""
    service = service_of(request)
    asked = parse(LlamaFactoryRequest, await request.body())
    whole = Whole(texts=asked.messages, max_tokens=asked.max_length, keep="left")
    scored = await service.score([whole])
    body = {
        "id": f"scoreeval-{uuid4().hex}",
        "object": "score.evaluation",
        "model": scored.model.name,
        "scores": values(service, scored),
    }
    return drop_in_reply(body, scored)
