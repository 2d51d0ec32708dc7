"""The FastAPI application: its routes, errors as the protocol words them, the body limit."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, TypeVar, cast

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import Response
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json, to_json
from starlette.exceptions import HTTPException

from reward_actor.errors import RewardServiceError
from reward_actor.schema import error_reply
from serve.logs import ERROR_HEADER, RequestLog

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from serve.service import RewardService
    from serve.swap import Swapper

Body = TypeVar("Body", bound=BaseModel)

_TYPE_OF_STATUS = {404: "not_found", 413: "body_too_large"}
_SERVICE_HEADER = b"x-rayward-service"
_SCHEMAS = "#/components/schemas/{model}"


def build_api(service: RewardService, swapper: Swapper) -> FastAPI:
    """The application of one ingress."""
    from serve import routes
    from serve.playground import routes as playground
    from serve.protocols import kserve, llama_factory, openrlhf, shared, slime, tei, vllm

    api = FastAPI(
        title="Rayward",
        summary="Rewards of completions, for PPO and GRPO trainers.",
        version=_version(),
    )
    api.state.service = service
    api.state.swapper = swapper
    for module in (shared, openrlhf, vllm, tei, llama_factory, slime, kserve, routes, playground):
        api.include_router(module.router)
    api.add_exception_handler(RewardServiceError, _service_error)
    api.add_exception_handler(RequestValidationError, _invalid)
    api.add_exception_handler(HTTPException, _http_error)
    api.add_exception_handler(Exception, _our_bug)
    api.add_middleware(BodyLimit, limit=service.config.body_limit_bytes)
    api.add_middleware(OwnRequests, name=os.environ.get("RAYWARD_SERVICE"))
    # The last is the outermost: it tells of what the others refuse, too.
    api.add_middleware(RequestLog, on_answer=service.observer.answered)
    _describe(api)
    return api


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
        # A lone surrogate is no reason to refuse the other samples.
        try:
            return json.loads(body)
        except (ValueError, RecursionError):
            pass
    raise RequestValidationError([{"loc": ("body",), "msg": message}])


def check(model: type[Body], value: Any) -> Body:
    """What `load` gave, as this model. Raises RequestValidationError."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)
    raise RequestValidationError(found)


def json_reply(value: Any, headers: dict[str, str] | None = None) -> Response:
    return Response(to_json(value), headers=headers, media_type="application/json")


def json_body(*models: type[BaseModel], others: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """`openapi_extra` of a route that parses its body itself: JSON of one of the models, with their
    examples, or other media types with their schemas."""
    refs = [{"$ref": _SCHEMAS.format(model=model.__name__)} for model in models]
    examples: dict[str, Any] = {}
    for model in models:
        _DESCRIBED[model.__name__] = model
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


_DESCRIBED: dict[str, type[BaseModel]] = {}


def _describe(api: FastAPI) -> None:
    """Give the OpenAPI document the schemas of the bodies that routes parse themselves."""

    def openapi() -> dict[str, Any]:
        if api.openapi_schema is None:
            document = get_openapi(
                title=api.title, version=api.version, summary=api.summary, routes=api.routes
            )
            schemas = document.setdefault("components", {}).setdefault("schemas", {})
            for name, model in _DESCRIBED.items():
                found = model.model_json_schema(ref_template=_SCHEMAS)
                schemas.update(found.pop("$defs", {}))
                schemas[name] = found
            api.openapi_schema = document
        return api.openapi_schema

    api.openapi = openapi  # type: ignore[method-assign]


class OwnRequests:
    """Refuses what the HAProxy of another service sends: to the port of its ingress that died.

    The client tries again, and its service has found another ingress by then.
    """

    def __init__(self, app: ASGIApp, name: str | None) -> None:
        self._app = app
        self._name = None if name is None else name.encode("ascii")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._name is not None:
            meant = next((v for k, v in scope["headers"] if k == _SERVICE_HEADER), self._name)
            if meant != self._name:
                message = "this ingress belongs to another service; try again"
                await _reply("unavailable", message)(scope, receive, send)
                return
        await self._app(scope, receive, send)


class BodyLimit:
    """Refuses a body above `limit` bytes, announced or not, with status 413."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        limit = self._limit
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if announced.isdigit() and int(announced) > limit:
            message = f"the body is larger than body_limit_bytes = {limit}"
            await _reply("body_too_large", message)(scope, receive, send)
            return
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > limit:
                # FastAPI turns any other exception of its body's reading into a 400.
                raise HTTPException(413, f"the body is larger than body_limit_bytes = {limit}")
            return message

        await self._app(scope, counted, send)


def error_response(request: Request, error: Exception) -> Response:
    """How the service answers an error of a request, which is one of those handled here."""
    if isinstance(error, RewardServiceError):
        return _service_error(request, error)
    if isinstance(error, RequestValidationError):
        return _invalid(request, error)
    return _http_error(request, error)


def _service_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RewardServiceError)
    return _reply(error.type, error.message, index=error.index, retry_after_s=error.retry_after_s)


def _invalid(request: Request, error: Exception) -> Response:
    """What is wrong and where, never the input: it may hold a NaN, a lone surrogate, a prompt."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = [part for part in first["loc"] if part != "body"]
    shown = ".".join(str(part)[:64] for part in place)
    indices = [part for part in place if isinstance(part, int)]
    message = f"{shown}: {first['msg']}" if shown else str(first["msg"])
    return _reply("invalid_request", message, index=indices[0] if indices else None)


def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    type_ = _TYPE_OF_STATUS.get(error.status_code, "invalid_request")
    response = _reply(type_, str(error.detail))
    if error.status_code != 400:  # FastAPI's for a body that is not JSON: as invalid as any other
        response.status_code = error.status_code
    for name, value in (error.headers or {}).items():
        response.headers[name] = value
    return response


def _our_bug(request: Request, error: Exception) -> Response:
    """Starlette logs the exception; the caller learns only that it was not his fault."""
    return _reply("internal", f"{type(error).__name__} in the service; its log says more")


def _reply(
    type_: Any, message: str, *, index: int | None = None, retry_after_s: float | None = None
) -> Response:
    status, body = error_reply(type_, message, index=index)
    headers = {ERROR_HEADER.decode(): type_}
    if retry_after_s is not None:
        headers["Retry-After"] = str(max(1, math.ceil(retry_after_s)))
    # ASCII only: a message may name a key of the request that is not valid Unicode.
    text = json.dumps(body, ensure_ascii=True)
    return Response(text, status, headers, "application/json")


def _version() -> str:
    try:
        return version("rayward")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "0"
