"""The page at `/playground` and the files that belong to it, under a strict policy of content.

The page needs no build step and asks nobody but this service. It calls the same routes as anyone,
with the same token; the files themselves hold nothing secret.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import HTMLResponse, Response

from serve.http.auth import PublicRoute

router = APIRouter(route_class=PublicRoute)

_HERE = Path(__file__).parent
_MEDIA_TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
# A fixed list: no part of a request's path ever names a file.
FILES = (
    "api.js",
    "app.js",
    "cards.js",
    "compose.js",
    "dom.js",
    "header.js",
    "heatmap.css",
    "heatmap.js",
    "histogram.js",
    "icon.svg",
    "layout.css",
    "monitor.css",
    "monitor.js",
    "theme.css",
)

# Nothing from elsewhere, nothing inline, no frame around the page; and, where the browser knows
# Trusted Types, no text that becomes HTML, whatever a completion holds.
CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
_HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "Cache-Control": "no-cache",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_PAGE = (_HERE / "index.html").read_bytes()


@router.get("/playground", tags=["service"], response_class=HTMLResponse)
async def playground() -> Response:
    """A page to score text by hand: rewards, ranking, a heat map of the tokens, monitoring."""
    return Response(_PAGE, media_type="text/html", headers=_HEADERS)


def _file(name: str) -> Callable[[], Awaitable[Response]]:
    content = (_HERE / name).read_bytes()
    media_type = _MEDIA_TYPES[Path(name).suffix]

    async def file() -> Response:
        return Response(content, media_type=media_type, headers=_HEADERS)

    return file


for _name in FILES:
    router.add_api_route(f"/playground/{_name}", _file(_name), include_in_schema=False)
