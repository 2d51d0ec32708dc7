"""slime's remote reward model (`--rm-type remote_rm --rm-url URL`): one sample, one bare number.

Its prompt is a list of messages, a plain text, or (with `--apply-chat-template`) a text that went
through a chat template already, which is told by how it begins; its response holds the end
token of its turn as it was sampled. It sends no model name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Request, Response
from pydantic import ConfigDict, Discriminator, Field, Tag

from reward_actor import schema
from reward_actor.groups import Group, Whole
from serve.http.auth import ScoreRoute
from serve.http.requests import json_body, parse, service_of
from serve.protocols.drop_in import DropIn, drop_in_reply, shape_of, values
from serve.protocols.messages import LenientMessage, as_messages

if TYPE_CHECKING:
    from reward_actor.render import Renderer

router = APIRouter(tags=["slime"], route_class=ScoreRoute)


class SlimeRequest(DropIn):
    """`label`, which comes with it, does not change a reward."""

    prompt: Annotated[
        Annotated[str, Tag("text")]
        | Annotated[list[LenientMessage], Field(min_length=1), Tag("objects")],
        Discriminator(shape_of),
    ]
    response: str

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"prompt": "Name two fruits.", "response": "An apple and a pear.", "label": None},
                {
                    "prompt": [{"role": "user", "content": "Hi."}],
                    "response": "Hello!<|im_end|>",
                    "label": "",
                },
            ]
        }
    )


@router.post(
    "/reward/slime",
    response_model=float,
    responses=schema.ERROR_RESPONSES,
    openapi_extra=json_body(SlimeRequest),
)
async def slime(request: Request) -> Response:
    """Score one completion."""
    service = service_of(request)
    asked = parse(SlimeRequest, await request.body())
    model = await service.known_model()
    scored = await service.score([to_group(asked, model.renderer)])
    [value] = values(service, scored)
    return drop_in_reply(value, scored)


def to_group(request: SlimeRequest, renderer: Renderer) -> Group | Whole:
    prompt: Any = request.prompt
    if isinstance(prompt, str) and renderer.is_templated(prompt):
        return Whole(texts=[prompt + request.response])
    completion = request.response.removesuffix(renderer.contract.turn_end)
    return Group(prompt if isinstance(prompt, str) else as_messages(prompt), [completion])
