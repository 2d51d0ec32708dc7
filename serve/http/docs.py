"""The page at `/docs`: Swagger UI from a package, so that nothing of it comes from elsewhere."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib.resources import files
from pathlib import Path

from fastapi import APIRouter
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import FileResponse, HTMLResponse

from serve.http.auth import PublicRoute

router = APIRouter(route_class=PublicRoute, include_in_schema=False)

FILES = ("swagger-ui-bundle.js", "swagger-ui.css")
_STATIC = Path(str(files("fastapi_offline") / "static"))
# FastAPI's page has a script in it, and Swagger UI its icons.
_POLICY = "default-src 'self' 'unsafe-inline'; img-src 'self' data:; frame-ancestors 'none'"


@router.get("/docs")
async def docs() -> HTMLResponse:
    page = get_swagger_ui_html(
        openapi_url="openapi.json",
        title="Rayward API",
        swagger_js_url=f"docs/{FILES[0]}",
        swagger_css_url=f"docs/{FILES[1]}",
        swagger_favicon_url="playground/icon.svg",
    )
    page.headers["Content-Security-Policy"] = _POLICY
    return page


def _file(name: str) -> Callable[[], Awaitable[FileResponse]]:
    async def file() -> FileResponse:
        return FileResponse(_STATIC / name)

    return file


for _name in FILES:
    router.add_api_route(f"/docs/{_name}", _file(_name), response_model=None)
