"""Bodies and replies: parsed by pydantic as they come, described in OpenAPI, written as JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar, cast

from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json, to_json

from reward_actor.config_errors import did_you_mean

if TYPE_CHECKING:
    from fastapi import Request
    from pydantic_core import ErrorDetails

    from serve.ingress.service import RewardService
    from serve.ingress.swap import Swapper

Body = TypeVar("Body", bound=BaseModel)

SCHEMA_REF = "#/components/schemas/{model}"

_READS_AS_FIELD = re.compile(r"[A-Za-z0-9_.-]{1,64}")


def service_of(request: Request) -> RewardService:
    return cast("RewardService", request.app.state.service)


def swapper_of(request: Request) -> Swapper:
    return cast("Swapper", request.app.state.swapper)


# ---- bodies: parsed by pydantic as they come, which takes half of FastAPI's way by json.loads


def parse(model: type[Body], body: bytes) -> Body:
    """A JSON body. Raises RequestValidationError."""
    return check(model, load(body))


def load(body: bytes) -> Any:
    """The value of a JSON body, for a route that tells by its keys what it is. Raises
    RequestValidationError."""
    try:
        return from_json(body)
    except ValueError as error:
        message = f"Invalid JSON: {error}"
    if b"\\u" in body:
        # A lone surrogate is no reason to refuse the other samples. Whatever else is wrong, its
        # depth above all, pydantic finds in the same body with other characters for its escapes.
        try:
            from_json(body.replace(b"\\u", b"n"))
            return json.loads(body)
        except ValueError:
            pass
    raise RequestValidationError([{"loc": ("body",), "msg": message}])


def check(model: type[Body], value: Any) -> Body:
    """What `load` gave, as this model. Raises RequestValidationError."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_input=False)[0]  # of a hostile body there are thousands
    raise RequestValidationError([_fault(model, value, first)])


def _fault(model: type[BaseModel], value: Any, fault: ErrorDetails) -> dict[str, Any]:
    """What is wrong and where, without what the request says: keys are input as its values are.
    Of an unknown one the name is shown if it reads as a field's, which no prompt does."""
    is_unknown = fault["type"] == "extra_forbidden"
    names = _field_names(model)
    path = fault["loc"][:-1] if is_unknown else fault["loc"]
    place = [part for part in path if isinstance(part, int) or part in names]
    if not is_unknown:
        return {"loc": place, "msg": fault["msg"]}
    key = str(fault["loc"][-1])
    shown = repr(key) if _READS_AS_FIELD.fullmatch(key) else _position(value, path, key)
    known = _fields_at(model, place)
    return {"loc": place, "msg": f"unknown field {shown}" + did_you_mean(key, known)}


def _position(value: Any, path: Sequence[int | str], key: str) -> str:
    """Of a key among those of its object."""
    for part in path:
        if isinstance(part, int) or part in value:  # else it is a label of pydantic's
            value = value[part]
    return f"number {list(value).index(key) + 1} of {len(value)}"


@cache
def _schema(model: type[BaseModel]) -> dict[str, Any]:
    return model.model_json_schema()


def _field_names(model: type[BaseModel]) -> frozenset[str]:
    """Of a model and all that it holds."""
    described = [_schema(model), *_schema(model).get("$defs", {}).values()]
    return frozenset(name for each in described for name in each.get("properties", {}))


def _fields_at(model: type[BaseModel], place: Sequence[int | str]) -> list[str]:
    """Those that the object at a place of the body may have."""
    shapes = list(_shapes(model, _schema(model)))
    for part in place:
        inner = [
            shape.get("items") if isinstance(part, int) else shape.get("properties", {}).get(part)
            for shape in shapes
        ]
        shapes = [shape for node in inner if node for shape in _shapes(model, node)]
    return sorted({name for shape in shapes for name in shape.get("properties", {})})


def _shapes(model: type[BaseModel], node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A node of the model's JSON schema, and each that it may be by reference or by choice."""
    yield node
    if "$ref" in node:
        yield from _shapes(model, _schema(model)["$defs"][node["$ref"].rpartition("/")[2]])
    for choice in node.get("anyOf", ()):
        yield from _shapes(model, choice)


def json_reply(value: Any, headers: dict[str, str] | None = None) -> Response:
    return Response(to_json(value), headers=headers, media_type="application/json")


def json_body(*models: type[BaseModel], others: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """`openapi_extra` of a route that parses its body itself: JSON of one of the models, with their
    examples, or other media types with their schemas."""
    refs = [{"$ref": SCHEMA_REF.format(model=model.__name__)} for model in models]
    examples: dict[str, Any] = {}
    for model in models:
        DESCRIBED[model.__name__] = model
        extra = model.model_config.get("json_schema_extra")
        assert isinstance(extra, dict), f"{model.__name__} has no examples"
        found = cast("list[Any]", extra["examples"])
        for index, example in enumerate(found):
            name = f"{model.__name__} {index + 1}" if len(found) > 1 else model.__name__
            examples[name] = {"value": example}
    schema = refs[0] if len(refs) == 1 else {"anyOf": refs}
    content: dict[str, Any] = {"application/json": {"schema": schema, "examples": examples}}
    content.update(others or {})
    return {"requestBody": {"required": True, "content": content}}


DESCRIBED: dict[str, type[BaseModel]] = {}
