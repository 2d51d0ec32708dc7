"""The FastAPI application: its routes with their guards, and errors as the protocol words them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import cache
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
from reward_actor.schema import ErrorType
from serve.auth import Tokens, guard, rule_of
from serve.faults import Faults
from serve.limits import Limits, OwnRequests
from serve.logs import RequestLog
from serve.replies import error_response

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails
    from starlette.types import ASGIApp, Receive, Scope, Send

    from serve.service import RewardService
    from serve.swap import Swapper

Body = TypeVar("Body", bound=BaseModel)

_TYPE_OF_STATUS: dict[int, ErrorType] = {
    404: "not_found",
    408: "deadline_exceeded",
    413: "body_too_large",
}
_SCHEMAS = "#/components/schemas/{model}"


def build_api(service: RewardService, swapper: Swapper) -> FastAPI:
    """The application of one ingress. Raises ValueError for a token file that cannot be used."""
    from serve import routes
    from serve.playground import routes as playground
    from serve.protocols import kserve, llama_factory, openrlhf, shared, slime, tei, vllm

    config = service.config
    api = FastAPI(
        title="Rayward",
        summary="Rewards of completions, for PPO and GRPO trainers.",
        version=_version(),
        redoc_url=None,
        swagger_ui_oauth2_redirect_url=None,
    )
    api.state.service = service
    api.state.swapper = swapper
    for module in (shared, openrlhf, vllm, tei, llama_factory, slime, kserve, routes, playground):
        api.include_router(module.router)
    api.add_exception_handler(RewardServiceError, _service_error)
    api.add_exception_handler(RequestValidationError, _invalid)
    api.add_exception_handler(HTTPException, _http_error)
    tokens = None if config.token_file is None else Tokens(config.token_file)
    guard(api, tokens, browsers_stay_here=not config.allow_unauthenticated)
    if tokens is None and config.allow_unauthenticated:
        api.add_middleware(OwnOrigin)
    api.add_middleware(Limits, config=config)
    api.add_middleware(OwnRequests, name=os.environ.get("RAYWARD_SERVICE"))
    api.add_middleware(Faults)
    # The last is the outermost: it tells of what the others refuse, too.
    api.add_middleware(RequestLog, on_answer=service.observer.answered)
    _describe(api, is_guarded=tokens is not None)
    return api


class OwnOrigin:
    """Refuses what a browser sends for a page of another origin to a service with
    `allow_unauthenticated`, which its clients may call by any name.

    The rule on `Host`, which stops DNS rebinding, cannot hold there: a page whose owner lets its
    name resolve to the service's address has the service's own origin, and reads everything.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._app
        if scope["type"] == "http" and _is_of_another_origin(dict(scope["headers"])):
            app = error_response(
                "forbidden",
                "this comes from a web page of another site; a service without tokens takes "
                "requests of its own pages only (start it with --token-file to open it to others; "
                "a proxy before it must pass Host on)",
            )
        await app(scope, receive, send)


def _is_of_another_origin(headers: dict[bytes, bytes]) -> bool:
    origin = headers.get(b"origin")
    if origin is None:
        return False
    own = headers.get(b"host", b"").lower()
    return not own or origin.lower().partition(b"://")[2] != own  # "null" is nobody's own


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
        found = [_fault(model, fault) for fault in error.errors(include_input=False)]
    raise RequestValidationError(found)


def _fault(model: type[BaseModel], fault: ErrorDetails) -> dict[str, Any]:
    """What is wrong and where, without keys of the request: they are input as its values are."""
    names = _field_names(model)
    place = [part for part in fault["loc"] if isinstance(part, int) or part in names]
    message = fault["msg"]
    if fault["type"] == "extra_forbidden":
        message = f"there is a field that is not known; known are {', '.join(sorted(names))}"
    return {"loc": place, "msg": message}


@cache
def _field_names(model: type[BaseModel]) -> frozenset[str]:
    """Of a model and all that it holds."""
    document = model.model_json_schema()
    described = [document, *document.get("$defs", {}).values()]
    return frozenset(name for each in described for name in each.get("properties", {}))


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


def _describe(api: FastAPI, *, is_guarded: bool) -> None:
    """Give the OpenAPI document the schemas of the bodies that routes parse themselves, and what
    each route asks for."""

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
            if is_guarded:
                bearer = {"type": "http", "scheme": "bearer"}
                document["components"]["securitySchemes"] = {"bearer": bearer}
            for path, operations in document["paths"].items():
                for operation in operations.values():
                    # By its guard or its limits, each in the shape that its protocol gives errors.
                    refused = {"description": "Refused; the body says why"}
                    operation["responses"].setdefault("4XX", refused)
                    if is_guarded and rule_of(path) != "public":
                        operation["security"] = [{"bearer": []}]
            api.openapi_schema = document
        return api.openapi_schema

    api.openapi = openapi  # type: ignore[method-assign]


def answer_error(request: Request, error: Exception) -> Response:
    """How the service answers an error of a request, which is one of those handled here."""
    if isinstance(error, RewardServiceError):
        return _service_error(request, error)
    if isinstance(error, RequestValidationError):
        return _invalid(request, error)
    return _http_error(request, error)


def _service_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RewardServiceError)
    return error_response(
        cast("ErrorType", error.type),
        error.message,
        index=error.index,
        retry_after_s=error.retry_after_s,
    )


def _invalid(request: Request, error: Exception) -> Response:
    """What is wrong and where, never the input: it may hold a NaN, a lone surrogate, a prompt."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = [part for part in first["loc"] if part != "body"]
    shown = ".".join(map(str, place))
    indices = [part for part in place if isinstance(part, int)]
    message = f"{shown}: {first['msg']}" if shown else str(first["msg"])
    return error_response("invalid_request", message, index=indices[0] if indices else None)


def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    type_ = _TYPE_OF_STATUS.get(error.status_code, "invalid_request")
    response = error_response(type_, str(error.detail))
    if error.status_code != 400:  # FastAPI's for a body that is not JSON: as invalid as any other
        response.status_code = error.status_code
    for name, value in (error.headers or {}).items():
        response.headers[name] = value
    return response


def _version() -> str:
    try:
        return version("rayward")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "0"
