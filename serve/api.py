"""The FastAPI application of an ingress: its routes with their guards, and its OpenAPI document."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, cast

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException

from reward_actor.errors import RewardServiceError
from serve.errors import answer_http_error, answer_invalid, answer_service_error
from serve.http import docs, routes
from serve.http.auth import guard
from serve.http.faults import Faults
from serve.http.limits import Limits, OwnRequests
from serve.http.requests import DESCRIBED, SCHEMA_REF
from serve.http.tokens import Tokens
from serve.monitoring.request_log import RequestLog
from serve.playground import routes as playground
from serve.protocols import (
    absent,
    kserve,
    llama_factory,
    native,
    openrlhf,
    shared,
    slime,
    tei,
    vllm,
)

if TYPE_CHECKING:
    from serve.ingress.service import RewardService
    from serve.ingress.swap import Swapper


def build_api(service: RewardService, swapper: Swapper) -> FastAPI:
    """The application of one ingress. Raises ValueError for a token file that cannot be used."""
    config = service.config
    api = FastAPI(
        title="Rayward",
        summary="Rewards of completions, for PPO and GRPO trainers.",
        version=_version(),
        docs_url=None,  # from a CDN
        redoc_url=None,
        swagger_ui_oauth2_redirect_url=None,
    )
    api.state.service = service
    api.state.swapper = swapper
    for own in api.routes:  # the OpenAPI document, the same in every installation
        own.rule = "public"  # type: ignore[attr-defined]
    for module in (
        shared,
        native,
        openrlhf,
        vllm,
        tei,
        llama_factory,
        slime,
        kserve,
        routes,
        playground,
    ):
        api.include_router(module.router)
    for router in (docs.router, kserve.public, routes.public, routes.admin):
        api.include_router(router)
    api.add_exception_handler(RewardServiceError, answer_service_error)
    api.add_exception_handler(RequestValidationError, answer_invalid)
    api.add_exception_handler(HTTPException, answer_http_error)
    api.add_exception_handler(404, absent.answer_no_route)
    tokens = None if config.token_file is None else Tokens(config.token_file)
    guard(api, tokens, by_any_name=config.allow_unauthenticated)
    api.add_middleware(Limits, config=config)
    api.add_middleware(OwnRequests, name=os.environ.get("RAYWARD_SERVICE"))
    api.add_middleware(Faults)
    # The last is the outermost: it tells of what the others refuse, too.
    api.add_middleware(RequestLog, on_answer=service.observer.answered)
    _describe(api, is_guarded=tokens is not None)
    return api


def _describe(api: FastAPI, *, is_guarded: bool) -> None:
    """Give the OpenAPI document the schemas of the bodies that routes parse themselves, and what
    each route asks for."""

    def openapi() -> dict[str, Any]:
        if api.openapi_schema is None:
            document = get_openapi(
                title=api.title, version=api.version, summary=api.summary, routes=api.routes
            )
            schemas = document.setdefault("components", {}).setdefault("schemas", {})
            for name, model in DESCRIBED.items():
                found = model.model_json_schema(ref_template=SCHEMA_REF)
                schemas.update(found.pop("$defs", {}))
                schemas[name] = found
            if is_guarded:
                bearer = {"type": "http", "scheme": "bearer"}
                document["components"]["securitySchemes"] = {"bearer": bearer}
            guarded = cast("list[Any]", api.routes)
            public = {route.path for route in guarded if route.app.rule == "public"}
            for path, operations in document["paths"].items():
                for operation in operations.values():
                    # By its guard or its limits, each in the shape that its protocol gives errors.
                    refused = {"description": "Refused; the body says why"}
                    operation["responses"].setdefault("4XX", refused)
                    if is_guarded and path not in public:
                        operation["security"] = [{"bearer": []}]
            api.openapi_schema = document
        return api.openapi_schema

    api.openapi = openapi  # type: ignore[method-assign]


def _version() -> str:
    try:
        return version("rayward")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "0"
