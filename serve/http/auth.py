"""Who may call what: the rule that each route declares by its class."""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from fastapi.routing import APIRoute

from serve.errors import error_response
from serve.http.origin import refusal_of_pages
from serve.http.tokens import Tokens

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fastapi import FastAPI
    from starlette.types import ASGIApp, Receive, Scope, Send

    from serve.config import ServeConfig

Rule = Literal["public", "score", "admin"]


class PublicRoute(APIRoute):
    """For anyone: it tells nothing but whether the service can score, or what is the same in every
    installation."""

    rule: ClassVar[Rule] = "public"


class ScoreRoute(APIRoute):
    """Scores, or tells what is served and how it does."""

    rule: ClassVar[Rule] = "score"


class AdminRoute(APIRoute):
    """Changes the service."""

    rule: ClassVar[Rule] = "admin"


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens at `host`."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def require_guard(host: str, config: ServeConfig) -> None:
    """Raise ValueError for a service that other machines could use without a token."""
    is_open = config.token_file is None and not config.allow_unauthenticated
    if is_open and not is_loopback(host):
        raise ValueError(
            f"a service at {host} can be reached from other machines, so it needs tokens: make one "
            "with `rayward token NAME --file tokens.json` and start with --token-file tokens.json, "
            "or say that nobody else can reach it with --allow-unauthenticated"
        )


def guard(api: FastAPI, tokens: Tokens | None, *, by_any_name: bool) -> None:
    """Put before each route that the application has by now the rule of its class. A route of
    another class is refused, with and without tokens.

    The check sits inside the route, behind the router: there is no second reading of a path that
    could disagree with the router's. `by_any_name` is for a service without tokens.
    """
    for route in api.routes:
        guarded: Any = route
        guarded.app = Guard(guarded.app, getattr(route, "rule", None), tokens, by_any_name)


class Guard:
    """One route's rule. Refuses before any of the body is read."""

    def __init__(
        self, app: ASGIApp, rule: Rule | None, tokens: Tokens | None, by_any_name: bool
    ) -> None:
        self._app = app
        self.rule = rule
        self._tokens = tokens
        self._by_any_name = by_any_name

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope)
        app = self._app if refusal is None else refusal
        await app(scope, receive, send)

    def _refusal(self, scope: Scope) -> ASGIApp | None:
        if self.rule is None:
            return error_response(
                "forbidden", "this route has no rule yet that says who may use it"
            )
        if self._tokens is None:
            return refusal_of_pages(scope["headers"], by_any_name=self._by_any_name)
        if self.rule == "public":
            return None
        scopes = self._tokens.scopes(token) if (token := _bearer(scope["headers"])) else None
        if scopes is None:
            return error_response(
                "unauthenticated",
                "this needs a token of the service: Authorization: Bearer TOKEN",
                headers={"WWW-Authenticate": 'Bearer realm="rayward"'},
            )
        if self.rule not in scopes:
            return error_response(
                "forbidden",
                f"the token is good, but has not the scope {self.rule!r}",
                headers={
                    "WWW-Authenticate": f'Bearer error="insufficient_scope", scope="{self.rule}"'
                },
            )
        return None


def _bearer(headers: Sequence[tuple[bytes, bytes]]) -> bytes | None:
    """The token of the one Authorization header."""
    found = [value for name, value in headers if name == b"authorization"]
    if len(found) != 1:
        return None
    scheme, _, token = found[0].partition(b" ")
    return token.strip() if scheme.lower() == b"bearer" else None
