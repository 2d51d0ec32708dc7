"""How a client's requests reach an endpoint: connections that stay, TLS, proxies, the token."""

from __future__ import annotations

import os
import socket
import ssl
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import httpx

from reward_actor.errors import RewardServiceError

TOKEN_VARIABLE = "RAYWARD_TOKEN"
Verify = bool | str | ssl.SSLContext

# A trainer calls in bursts; between them its connections live on.
_KEEP_ALIVE_S = 30.0
_CONNECT_S = 10.0
# A machine that has vanished, by power or network, says nothing: find out within half a minute.
# Probes tell where a reply is waited for; where data is not acknowledged none are sent, and the
# last option (in milliseconds) ends the connection.
_PROBES = {
    "TCP_KEEPIDLE": 10,
    "TCP_KEEPINTVL": 5,
    "TCP_KEEPCNT": 4,
    "TCP_USER_TIMEOUT": 30_000,
}


def connect(url: str, token: str | None, verify: Verify) -> httpx.AsyncClient:
    """The connections to one endpoint. Raises ValueError for a token or a file that cannot be."""
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    options = [
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    ]
    for name, value in _PROBES.items():
        if hasattr(socket, name):  # not everywhere
            options.append((socket.IPPROTO_TCP, getattr(socket, name), value))
    transport = httpx.AsyncHTTPTransport(
        verify=_verify(verify),
        limits=httpx.Limits(keepalive_expiry=_KEEP_ALIVE_S),
        proxy=_proxy(url),
        socket_options=options,
    )
    return httpx.AsyncClient(
        base_url=url,
        headers=headers,
        transport=transport,
        timeout=httpx.Timeout(None, connect=_CONNECT_S),
    )


def checked_token(token: str | None) -> str | None:
    """The token, by default that of $RAYWARD_TOKEN. Raises ValueError, which does not show it."""
    token = (os.environ.get(TOKEN_VARIABLE) if token is None else token) or ""
    token = token.strip()
    if not token.isascii() or not token.isprintable() or " " in token:
        raise ValueError("the token must be printable ASCII without spaces")
    return token or None


def unreachable(url: str, error: httpx.TransportError) -> RewardServiceError:
    """What a request means that got no reply. It may be sent again unless the certificate is to
    blame, which stays what it is."""
    if _is_about_certificate(error):
        message = f"{url}: its certificate is not trusted; name its authority's file as verify="
        return RewardServiceError("unavailable", message)
    # The text of other errors may hold a piece of the request.
    detail = f": {error}" if isinstance(error, httpx.ConnectError) else ""
    message = f"{url}: {type(error).__name__}{detail}"
    return RewardServiceError("unavailable", message, retryable=True)


def _is_about_certificate(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _verify(verify: Verify) -> bool | ssl.SSLContext:
    if not isinstance(verify, str):
        return verify
    try:
        return ssl.create_default_context(cafile=verify)
    except (OSError, ssl.SSLError) as error:
        raise ValueError(f"verify is {verify!r}, which cannot be read as PEM: {error}") from None


def _proxy(url: str) -> str | None:
    """The proxy that the environment names for this address."""
    parts = urlsplit(url)
    if proxy_bypass(parts.netloc):
        return None
    proxies = getproxies()
    return proxies.get(parts.scheme) or proxies.get("all")
