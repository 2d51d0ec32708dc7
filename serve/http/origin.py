"""Requests that a browser sends for a page of another origin."""

from __future__ import annotations

from typing import TYPE_CHECKING

from serve.errors import error_response

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send


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
