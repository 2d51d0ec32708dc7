"""OpenRLHF's remote reward model (`--reward.remote_url`, older `--remote_rm_url`).

Its queries are prompt and completion as decoded with their special tokens, so nothing is added to
them. It sends no model name.
"""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict

from reward_actor import schema
from reward_actor.groups import LOGGED_AS, Whole
from serve.http.auth import ScoreRoute
from serve.http.requests import json_body, parse, service_of
from serve.protocols.drop_in import DropIn, drop_in_reply, named_values, num_tokens, values

router = APIRouter(tags=["OpenRLHF"], route_class=ScoreRoute)


class OpenRlhfRequest(DropIn):
    """`prompts` and `labels`, which come with it, do not change a reward."""

    query: list[str]

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "query": [
                        "<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>"
                    ],
                    "prompts": ["<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\n"],
                    "labels": [None],
                }
            ]
        }
    )


class OpenRlhfReply(BaseModel):
    """Every list has one number a query; OpenRLHF logs the means of `extra_logs`."""

    rewards: list[float]
    scores: list[float]
    extra_logs: dict[str, list[float]]


@router.post(
    "/get_reward",
    response_model=OpenRlhfReply,
    responses=schema.ERROR_RESPONSES,
    openapi_extra=json_body(OpenRlhfRequest),
)
async def get_reward(request: Request) -> Response:
    """Score whole texts; empty lists, which OpenRLHF sends with several URLs, are answered too."""
    service = service_of(request)
    asked = parse(OpenRlhfRequest, await request.body())
    scored = await service.score([Whole(texts=asked.query)])
    rewards = values(service, scored)
    named = named_values(service, scored)
    logs = {
        "num_tokens": num_tokens(scored.results),
        **{LOGGED_AS.format(name): rewards_of for name, rewards_of in named.items()},
    }
    return drop_in_reply({"rewards": rewards, "scores": rewards, "extra_logs": logs}, scored)
