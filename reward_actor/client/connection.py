"""Connections to endpoints (TLS, proxies, the token), and a request sent until it is answered.

Every request that is sent here may be sent again: scoring is a pure function, and a swap to the
model that is served already changes nothing.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import os
import socket
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from ipaddress import ip_address
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import httpx

from reward_actor.client import bodies
from reward_actor.client.endpoints import Endpoints
from reward_actor.errors import RewardServiceError

logger = logging.getLogger(__name__)

TOKEN_VARIABLE = "RAYWARD_TOKEN"
Verify = bool | str | ssl.SSLContext

# A trainer calls in bursts; between them its connections live on.
_KEEP_ALIVE_S = 30.0
_CONNECT_S = 4.0
# An outage of this long is worth a line; a restart is not.
_TELL_AFTER_S = 1.0
# A machine that has vanished, by power or network, says nothing: find out within half a minute.
# Probes tell where a reply is waited for; where data is not acknowledged none are sent, and the
# last option (in milliseconds) ends the connection.
_PROBES = {
    "TCP_KEEPIDLE": 10,
    "TCP_KEEPINTVL": 5,
    "TCP_KEEPCNT": 4,
    "TCP_USER_TIMEOUT": 30_000,
}


_NOT_CONNECTED = (httpx.ConnectError, httpx.ConnectTimeout)


@dataclass(frozen=True)
class Proxy:
    """What the environment has requests go through. `url` may hold a password; its text does not.

    variable: the environment's, which names it.
    """

    url: str = field(repr=False)
    variable: str

    def __str__(self) -> str:
        parts = urlsplit(self.url)
        return f"the proxy {parts.scheme}://{parts.netloc.rpartition('@')[2]} ({self.variable})"


def connect(
    url: str, token: str | None, verify: bool | ssl.SSLContext, proxy: Proxy | None = None
) -> httpx.AsyncClient:
    """The connections to one endpoint."""
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    options = [
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    ]
    for name, value in _PROBES.items():
        if hasattr(socket, name):  # not everywhere
            options.append((socket.IPPROTO_TCP, getattr(socket, name), value))
    transport = httpx.AsyncHTTPTransport(
        verify=verify,
        limits=httpx.Limits(keepalive_expiry=_KEEP_ALIVE_S),
        proxy=None if proxy is None else proxy.url,
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


def unreachable(
    url: str, error: httpx.TransportError, proxy: Proxy | None = None
) -> RewardServiceError:
    """What a request means that got no reply. It may be sent again unless the certificate is to
    blame, which stays what it is, or a proxy's rules."""
    where = url if proxy is None else f"{url} through {proxy}"
    if _is_about_certificate(error):
        message = f"{where}: its certificate is not trusted; name its authority's file as verify="
        return RewardServiceError("unavailable", message)
    if proxy is not None and isinstance(error, httpx.ProxyError):
        status = str(error)[:3]  # of a tunnel that is refused; a SOCKS proxy has none
        return _refused(proxy, url, int(status) if status.isdigit() else None)
    # The text of an error may hold a piece of the request.
    message = f"{where}: {type(error).__name__}"
    if isinstance(error, _NOT_CONNECTED):
        detail = str(error) or type(error).__name__
        message = (
            f"nothing answers at {where} ({detail}); start a service there with `rayward serve "
            f"MODEL`, or check the address{'' if proxy is None else ' and the proxy'}"
        )
    return RewardServiceError("unavailable", message, retryable=True)


def _refusal_of(proxy: Proxy | None, url: str, reply: httpx.Response) -> RewardServiceError | None:
    """What a proxy's own reply means; None for one of the service, which all have an id. Out of a
    tunnel (for TLS, or a SOCKS proxy's) comes nothing of a proxy's own."""
    if (
        proxy is None
        or urlsplit(url).scheme == "https"
        or urlsplit(proxy.url).scheme[:5] == "socks"
    ):
        return None
    if reply.status_code == 200 or "X-Request-Id" in reply.headers:
        return None
    return _refused(proxy, url, reply.status_code)


def _refused(proxy: Proxy, url: str, status: int | None) -> RewardServiceError:
    did = "does not reach" if status is None else f"answered {status} in place of"
    message = (
        f"{proxy} {did} {url}; ask those who run it or, if the service can be reached without it, "
        f"add {urlsplit(url).hostname} to NO_PROXY"
    )
    is_passing = status is None or bodies.is_passing(status)
    return RewardServiceError("unavailable", message, retryable=is_passing)


def _is_about_certificate(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return True
        error = error.__cause__ or error.__context__
    return False


def tls(verify: Verify) -> ssl.SSLContext:
    """Raises ValueError for a file that cannot be read."""
    if not isinstance(verify, str):
        return httpx.create_ssl_context(verify)
    try:
        return ssl.create_default_context(cafile=verify)
    except (OSError, ssl.SSLError) as error:
        raise ValueError(f"verify is {verify!r}, which cannot be read as PEM: {error}") from None


def proxies(urls: Sequence[str]) -> dict[str, Proxy | None]:
    """What the environment has requests to each address go through; this machine's own are asked
    directly. Raises ValueError for a variable that names no proxy."""
    return {url: _proxy(url) for url in urls}


def _proxy(url: str) -> Proxy | None:
    parts = urlsplit(url)
    assert parts.hostname is not None
    if _is_loopback(parts.hostname) or proxy_bypass(parts.netloc):
        return None
    named = getproxies()
    kind = next((kind for kind in (parts.scheme, "all") if named.get(kind)), None)
    if kind is None:
        return None
    value = named[kind]
    variables = (name for name in os.environ if name.lower() == f"{kind}_proxy")
    variable = next((v for v in variables if os.environ[v] == value), "the system's settings")
    proxy = Proxy(value if "://" in value else f"http://{value}", variable)
    if (problem := _problem(proxy.url)) is not None:  # which may hold a password
        raise ValueError(
            f"{variable} {problem}; correct or unset it, or add {parts.hostname} to NO_PROXY"
        )
    return proxy


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def _problem(proxy_url: str) -> str | None:
    """What is wrong with the URL of a proxy, if anything is."""
    try:
        parsed = httpx.URL(proxy_url)
    except httpx.InvalidURL:
        return "is no URL"
    if parsed.scheme not in ("http", "https", "socks5", "socks5h") or not parsed.host:
        return (
            f"has the scheme {parsed.scheme!r} and the host {parsed.host!r}; a proxy is "
            "http://HOST:PORT, or the same with https or socks5"
        )
    if parsed.scheme.startswith("socks") and find_spec("socksio") is None:
        return 'names a SOCKS proxy, which needs `pip install "httpx[socks]"`'
    return None


class Sender:
    """The connections of one client in one event loop."""

    def __init__(
        self, token: str | None, verify: ssl.SSLContext, proxies: Mapping[str, Proxy | None]
    ) -> None:
        """proxies: by the addresses."""
        self.endpoints = Endpoints(list(proxies))
        self._proxies = proxies
        self._connections = {
            url: connect(url, token, verify, proxy) for url, proxy in proxies.items()
        }
        self._has_told = False

    async def send(
        self,
        method: str,
        path: str,
        body: bytes | None,
        media_type: str,
        deadline: float,
        on_failure: Callable[[RewardServiceError], None] = lambda _: None,
    ) -> httpx.Response:
        """The first reply with status 200. Raises RewardServiceError.

        deadline: of time.monotonic, for everything. on_failure: told of each attempt that failed
        and is followed by another.
        """
        failure: RewardServiceError | None = None
        started = time.monotonic()
        while True:
            now = time.monotonic()
            pause_s = self.endpoints.pause_s(now, is_first=failure is None)
            if now + pause_s >= deadline:
                raise self.too_late(failure or self.endpoints.least_bad().error)
            if pause_s > 0:
                await asyncio.sleep(pause_s)
            result = await self._attempt(method, path, body, media_type, deadline)
            if isinstance(result, httpx.Response):
                return result
            failure = result
            on_failure(failure)
            is_away = failure.type in ("unavailable", "asleep")
            if is_away and time.monotonic() >= started + _TELL_AFTER_S:
                self._tell(failure, deadline)

    async def check_reachable(self) -> None:
        """Raise RewardServiceError, within five seconds, if nothing answers at any address."""
        failures = await asyncio.gather(*map(self._not_connected, self._connections))
        if failures[0] is not None and all(failures):
            raise failures[0]

    async def _not_connected(self, url: str) -> RewardServiceError | None:
        proxy = self._proxies[url]
        try:
            reply = await self._connections[url].get("/health", timeout=_CONNECT_S)
        except (*_NOT_CONNECTED, httpx.ProxyError) as error:
            return unreachable(url, error, proxy)
        except httpx.TransportError:
            return None  # it is slow, or none of ours; a call finds out
        return _refusal_of(proxy, url, reply)

    def _tell(self, failure: RewardServiceError, deadline: float) -> None:
        """Once an outage, log what is waited for, and until when."""
        if not self._has_told:
            self._has_told = True
            left = deadline - time.monotonic()
            until = time.strftime("%H:%M:%S", time.localtime(time.time() + left))
            logger.warning("%s; trying again until %s (%.0f s)", failure.message, until, left)

    async def _attempt(
        self, method: str, path: str, body: bytes | None, media_type: str, deadline: float
    ) -> httpx.Response | RewardServiceError:
        """The reply, or why to try again. Raises RewardServiceError where that is of no use."""
        started = time.monotonic()
        endpoint = self.endpoints.choose(started)
        try:
            async with asyncio.timeout(deadline - started):
                reply = await self._connections[endpoint.url].request(
                    method, path, content=body, headers={"Content-Type": media_type}
                )
        except TimeoutError:
            failure = self.too_late(None)
            self.endpoints.failed(endpoint, failure, started, time.monotonic())
            raise failure from None
        except httpx.TransportError as error:
            failure = unreachable(endpoint.url, error, self._proxies[endpoint.url])
        else:
            if reply.status_code == 200:
                self.endpoints.succeeded(endpoint)
                self._has_told = False
                return reply
            failure = _refusal_of(self._proxies[endpoint.url], endpoint.url, reply) or (
                bodies.error_of(endpoint.url, reply.status_code, reply.headers, reply.content)
            )
        if not failure.retryable:
            raise failure
        self.endpoints.failed(endpoint, failure, started, time.monotonic())
        return failure

    def too_late(self, failure: RewardServiceError | None) -> RewardServiceError:
        """What a call ends with at its deadline: what kept it from ending well, if it is known."""
        if failure is not None:
            return copy.copy(failure)
        urls = ", ".join(endpoint.url for endpoint in self.endpoints.all)
        return RewardServiceError(
            "deadline_exceeded", f"no reply in time from {urls}", retryable=True
        )

    async def close(self) -> None:
        for connection in self._connections.values():
            await connection.aclose()
