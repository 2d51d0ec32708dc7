"""text-embeddings-inference's classification, `POST /predict` and `POST /`.

A pair is a prompt and its completion, rendered as the model was trained (TEI itself would put a
separator between the two); a single text is whole, and gets the tokenizer's special tokens. Scores
pass a sigmoid unless `raw_scores` is set. `truncate` cuts single texts; a pair that is too long is
an error, since its reward is read at its end. It sends no model name.

`huggingface_hub.InferenceClient` posts to the base URL, with `parameters`. It wants a list for each
text, as the Hub's own inference API answers, where TEI answers a single text with one list.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag

from reward_actor import schema
from reward_actor.groups import Group, Whole
from serve.http.auth import ScoreRoute
from serve.http.requests import json_body, parse, service_of
from serve.protocols.drop_in import DropIn, drop_in_reply, shape_of, sigmoid, values

router = APIRouter(tags=["text-embeddings-inference"], route_class=ScoreRoute)

Texts = Annotated[list[str], Field(min_length=1, max_length=2)]


Inputs = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[Texts, Tag("texts")]
    | Annotated[list[Texts], Tag("rows")],
    Discriminator(shape_of),
]
# Its clients write "right" or "Right".
Direction = Annotated[
    Literal["left", "right"],
    BeforeValidator(lambda value: value.lower() if isinstance(value, str) else value),
]


class InferenceParameters(DropIn):
    """Those of `InferenceClient.text_classification`; the best `top_k` of one label is that one."""

    function_to_apply: Literal["sigmoid", "none"] | None = None


class TeiRequest(DropIn):
    """`inputs`: a text, a pair [prompt, completion], or a batch [[text], [prompt, completion]]."""

    inputs: Inputs
    truncate: bool | None = False
    truncation_direction: Direction = "right"
    raw_scores: bool = False
    parameters: InferenceParameters | None = None

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "inputs": [["Name two fruits.", "An apple and a pear."]],
                    "raw_scores": True,
                },
                {
                    "inputs": "Human: Hi.\n\nAssistant: Hello!",
                    "raw_scores": True,
                },
            ]
        }
    )


class TeiPrediction(BaseModel):
    score: float
    label: Literal["reward"]


@router.post(
    "/",
    response_model=list[TeiPrediction] | list[list[TeiPrediction]],
    responses=schema.ERROR_RESPONSES,
    openapi_extra=json_body(TeiRequest),
)
@router.post(
    "/predict",
    response_model=list[TeiPrediction] | list[list[TeiPrediction]],
    responses=schema.ERROR_RESPONSES,
    openapi_extra=json_body(TeiRequest),
)
async def predict(request: Request) -> Response:
    """Score texts, or completions with their prompts."""
    service = service_of(request)
    asked = parse(TeiRequest, await request.body())
    scored = await service.score(to_groups(asked))
    found = values(service, scored)
    is_raw = asked.raw_scores
    if asked.parameters is not None and asked.parameters.function_to_apply is not None:
        is_raw = asked.parameters.function_to_apply == "none"
    scores = found if is_raw else [sigmoid(value) for value in found]
    predictions = [[{"score": score, "label": "reward"}] for score in scores]
    is_batch = shape_of(asked.inputs) == "rows" or asked.parameters is not None
    body = predictions if is_batch else predictions[0]
    return drop_in_reply(body, scored)


def to_groups(request: TeiRequest) -> list[Group | Whole]:
    inputs: Any = request.inputs
    batch: list[list[str]] = {"text": [[inputs]], "texts": [inputs], "rows": inputs}[
        shape_of(inputs)
    ]
    groups: list[Group | Whole] = []
    for texts in batch:
        if len(texts) == 2:
            groups.append(Group(texts[0], texts[1:]))
        else:
            groups.append(
                Whole(
                    texts,
                    add_special_tokens=True,
                    max_tokens="model" if request.truncate else None,
                    keep="left" if request.truncation_direction == "right" else "right",
                )
            )
    return groups
