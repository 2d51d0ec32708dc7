"""SGLang's reward models: /classify with `text` or `input_ids`, /v1/score with `query` and `items`.

As there, texts are whole, templated by their sender, and the tokenizer adds its special tokens; a
query and an item are put together as they are. A model name that is not the service's is a 404;
its directory is one, and "default", which SGLang's own clients send for whatever there is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal
from uuid import uuid4

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from reward_actor import schema
from reward_actor.errors import RewardServiceError
from reward_actor.groups import Whole
from serve.ingress.service import RewardService
from serve.protocols.drop_in import (
    DropIn,
    check_drop_in_model,
    drop_in_reply,
    num_tokens,
    shape_of,
    values,
)
from serve.protocols.vllm import Usage, usage

if TYPE_CHECKING:
    from fastapi import Response

    from serve.config import ServeConfig

# No text has so many for each of its tokens, but for runs of blanks.
_CHARACTERS_PER_TOKEN = 64

_TEMPLATED = "<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\n"


def _shape_of_ids(value: Any) -> str:
    return "rows" if shape_of(value) == "rows" else "ids"


class SglangClassifyRequest(DropIn):
    """One text or one list of token ids, which is answered by one object, or several of them."""

    text: (
        Annotated[
            Annotated[str, Tag("text")] | Annotated[list[str], Field(min_length=1), Tag("texts")],
            Discriminator(shape_of),
        ]
        | None
    ) = None
    input_ids: (
        Annotated[
            Annotated[list[schema.TokenId], Tag("ids")]
            | Annotated[list[list[schema.TokenId]], Field(min_length=1), Tag("rows")],
            Discriminator(_shape_of_ids),
        ]
        | None
    ) = None
    model: str | None = None

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"text": [_TEMPLATED + "Hello!<|im_end|>"]},
                {"input_ids": [[5, 6, 7], [5, 6, 8, 9]]},
            ]
        }
    )

    @model_validator(mode="after")
    def _is_either(self) -> SglangClassifyRequest:
        if self.text is not None and self.input_ids is not None:
            raise ValueError("text and input_ids are two ways to say the same; send one")
        return self

    def to_whole(self) -> Whole:
        if self.input_ids is not None:
            ids: Any = self.input_ids
            return Whole(ids=ids if _shape_of_ids(ids) == "rows" else [ids])
        texts = [self.text] if isinstance(self.text, str) else self.text
        return Whole(texts or (), add_special_tokens=True)

    @property
    def is_single(self) -> bool:
        if self.input_ids is not None:
            return _shape_of_ids(self.input_ids) == "ids"
        return isinstance(self.text, str)


class SglangScoreRequest(DropIn):
    """Scores `query + item` for each item, or `item + query`; texts or token ids, not a mixture."""

    query: Annotated[
        Annotated[str, Tag("text")] | Annotated[list[schema.TokenId], Tag("ids")],
        Discriminator(shape_of),
    ]
    items: Annotated[
        Annotated[str, Tag("text")]
        | Annotated[list[str], Field(min_length=1), Tag("texts")]
        | Annotated[list[list[schema.TokenId]], Tag("rows")],
        Discriminator(shape_of),
    ]
    item_first: bool = False
    apply_softmax: bool = False
    model: str | None = None

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"query": _TEMPLATED, "items": ["Hello!<|im_end|>", "Go away.<|im_end|>"]},
                {"query": [5, 6, 7], "items": [[8], [9, 10]]},
            ]
        }
    )

    @model_validator(mode="after")
    def _can_be_scored(self) -> SglangScoreRequest:
        items = [self.items] if isinstance(self.items, str) else self.items
        if isinstance(self.query, str) != isinstance(items[0], str):
            raise ValueError("query and items must both be text, or both be token ids")
        if self.apply_softmax:
            raise ValueError("apply_softmax would make 1.0 of every reward: there is one an item")
        return self


class SglangClassifyItem(BaseModel):
    embedding: list[float]
    meta_info: dict[str, Any]


class SglangScoreReply(BaseModel):
    scores: list[list[float]]
    model: str
    usage: Usage
    object: Literal["scoring"]


def check_size(request: SglangScoreRequest, config: ServeConfig) -> None:
    """Raise RewardServiceError for what is too much before it is put together: the query is written
    out with each item, which makes gigabytes of a body of megabytes."""
    items = [request.items] if isinstance(request.items, str) else request.items
    if len(items) > config.max_request_samples:
        raise RewardServiceError(
            "too_many_tokens",
            f"{len(items)} items in one request; max_request_samples is "
            f"{config.max_request_samples}",
        )
    is_text = isinstance(request.query, str)
    limit = config.max_request_tokens * (_CHARACTERS_PER_TOKEN if is_text else 1)
    num = len(items) * len(request.query) + sum(map(len, items))
    if num > limit:
        raise RewardServiceError(
            "too_many_tokens",
            f"{num} {'characters' if is_text else 'tokens'} in one request, the query counted with "
            f"each item; at max_request_tokens {config.max_request_tokens} it may hold {limit}. "
            "Send fewer items at a time.",
        )


def to_whole(request: SglangScoreRequest) -> Whole:
    query: Any = request.query
    items: Any = [request.items] if isinstance(request.items, str) else request.items
    joined = [item + query if request.item_first else query + item for item in items]
    if isinstance(query, str):
        return Whole(joined, add_special_tokens=True)
    return Whole(ids=joined)


async def classify(service: RewardService, request: SglangClassifyRequest) -> Response:
    """What `POST /classify` answers to SGLang's clients."""
    await _check_model(service, request.model)
    scored = await service.score([request.to_whole()])
    numbers = zip(values(service, scored), num_tokens(scored.results), strict=True)
    items = [
        {
            "embedding": [value],
            "meta_info": {
                "id": uuid4().hex,
                "prompt_tokens": num,
                "e2e_latency": scored.timings_ms["total"] / 1e3,
                "weight_version": scored.model_version,
            },
        }
        for value, num in numbers
    ]
    return drop_in_reply(items[0] if request.is_single else items, scored)


async def score(service: RewardService, request: SglangScoreRequest) -> Response:
    """What `POST /v1/score` answers to SGLang's clients."""
    await _check_model(service, request.model)
    check_size(request, service.config)
    scored = await service.score([to_whole(request)])
    body = {
        "scores": [[value] for value in values(service, scored)],
        "model": scored.model.name,
        "usage": usage(scored),
        "object": "scoring",
    }
    return drop_in_reply(body, scored)


async def _check_model(service: RewardService, name: str | None) -> None:
    if name != "default":
        await check_drop_in_model(service, name)
