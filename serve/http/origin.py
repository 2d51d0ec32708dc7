"""Requests that a browser sends for a page of another site to a service without tokens."""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from serve.errors import error_response

if TYPE_CHECKING:
    from collections.abc import Sequence

    from starlette.responses import Response


_BY_ADDRESS = (
    "this comes from a web page of another site; a service without tokens takes requests of its "
    "own pages only, by address (start it with --token-file to open it to others)"
)
_BY_ANY_NAME = (
    "this comes from a web page of another site; a service without tokens takes requests of its "
    "own pages only (start it with --token-file to open it to others; a proxy before it must pass "
    "Host on)"
)


def refusal_of_pages(
    headers: Sequence[tuple[bytes, bytes]], *, by_any_name: bool
) -> Response | None:
    """What a page of another site is answered; None for any other request.

    `by_any_name`: for a service with `allow_unauthenticated`, which its clients may call by any
    name. The rule on `Host`, which stops DNS rebinding, cannot hold there: a page whose owner lets
    its name resolve to the service's address has the service's own origin, and reads everything.
    """
    if not comes_from_elsewhere(headers, by_any_name=by_any_name):
        return None
    return error_response("forbidden", _BY_ANY_NAME if by_any_name else _BY_ADDRESS)


def comes_from_elsewhere(
    headers: Sequence[tuple[bytes, bytes]], *, by_any_name: bool = False
) -> bool:
    """Whether a browser sends this for a page that is not the service's own.

    A page of any site can make its reader's browser post to 127.0.0.1 without reading the reply,
    and one whose name its owner lets resolve to 127.0.0.1 (DNS rebinding) can read it, too. The
    first shows in `Origin`, the second in a `Host` that is a name instead of an address.
    """
    given = dict(headers)
    host = given.get(b"host", b"").decode("latin-1").lower()
    if host and not by_any_name and not _is_address(host):
        return True
    origin = given.get(b"origin")
    if origin is None:
        return False
    # "null" is nobody's own.
    return not host or origin.decode("latin-1").lower().partition("://")[2] != host


def _is_address(host: str) -> bool:
    """Of a Host header: an IP address or `localhost`, with or without a port."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or bool(ipaddress.ip_address(name))
    except ValueError:
        return False
