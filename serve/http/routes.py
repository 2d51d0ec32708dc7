"""The routes that are about the service itself; those that score are in `serve.protocols`."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from reward_actor import schema
from reward_actor.errors import RewardServiceError
from serve.http.auth import AdminRoute, PublicRoute, ScoreRoute
from serve.http.requests import json_body, parse, service_of, swapper_of

router = APIRouter(tags=["service"], route_class=ScoreRoute)
public = APIRouter(tags=["service"], route_class=PublicRoute)
admin = APIRouter(tags=["admin"], route_class=AdminRoute)


@router.get("/v1/models")
async def models(request: Request) -> schema.ModelList:
    """The models that this service scores with."""
    service = service_of(request)
    model = await service.model()
    card = schema.ModelCard(id=model.name, model_version=model.version)
    return schema.ModelList(data=[card])


@router.get("/info")
async def info(request: Request) -> schema.Info:
    """What is served, and every limit."""
    return await service_of(request).info()


@router.get("/v1/monitor")
async def monitor(request: Request) -> schema.MonitorReply:
    """The live rewards beside the held-out ones, by model version."""
    service = service_of(request)
    await service.model()
    return service.observer.monitor()


@public.get("/health")
async def health() -> schema.Status:
    """The ingress is alive."""
    return schema.Status(status="ok")


@public.get("/ready", responses={503: {"model": schema.Status}})
async def ready(request: Request) -> JSONResponse:
    """A model is loaded and its golden samples passed."""
    try:
        model = await service_of(request).model()
    except RewardServiceError as error:
        status = schema.Status(status="not_ready", reason="no replica has its model loaded")
        if error.type == "asleep":
            status = schema.Status(status="asleep", reason=error.message)
        return JSONResponse(status.model_dump(), status_code=503)
    if service_of(request).functions_hang:
        status = schema.Status(status="not_ready", reason="the reward functions hang")
        return JSONResponse(status.model_dump(), status_code=503)
    return JSONResponse(schema.Status(status="ok", model_version=model.version).model_dump())


@admin.get("/v1/admin/models", responses=schema.ERROR_RESPONSES)
async def registry(request: Request) -> schema.RegistryReply:
    """The models that can be swapped in, by name."""
    return await swapper_of(request).names()


@admin.post(
    "/v1/admin/models",
    response_model=schema.SwapReply,
    responses=schema.ERROR_RESPONSES,
    openapi_extra=json_body(schema.SwapRequest),
)
async def swap(request: Request) -> schema.SwapReply:
    """Serve another model of the registry from now on, without a pause."""
    asked = parse(schema.SwapRequest, await request.body())
    observer = service_of(request).observer
    try:
        reply = await swapper_of(request).swap(asked.model)
    except RewardServiceError as error:
        observer.swapped(error.type)
        raise
    observer.swapped("done")
    return reply


@admin.post("/v1/admin/sleep", responses=schema.ERROR_RESPONSES)
async def sleep(request: Request) -> schema.SleepReply:
    """Let every replica give its weights' memory back until the service is woken."""
    return await swapper_of(request).sleep()


@admin.post("/v1/admin/wake", responses=schema.ERROR_RESPONSES)
async def wake(request: Request) -> schema.SleepReply:
    """Score again, once every replica has its weights and reproduces its golden samples."""
    return await swapper_of(request).wake()
