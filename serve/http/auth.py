"""Who may call what: bearer tokens with scopes, and the rule that each route declares by its class.

A token file holds digests, never tokens:

    {"tokens": [{"name": "trainer", "sha256": "<64 hex digits>", "scopes": ["score"]}, ...]}

It is read again when it changes, so that tokens come and go without a restart.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import json
import logging
import secrets
import stat
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from reward_actor.atomic import replace_text
from serve.errors import error_response
from serve.http.origin import refusal_of_pages

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fastapi import FastAPI
    from starlette.types import ASGIApp, Receive, Scope, Send

    from serve.config import ServeConfig

logger = logging.getLogger("ray.serve")

Rule = Literal["public", "score", "admin"]
TokenScope = Literal["score", "admin"]

# How old what is known of the file may be.
_LOOK_EVERY_S = 1.0


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


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, Field(min_length=1, max_length=128)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    scopes: Annotated[list[TokenScope], Field(min_length=1)]


class _TokenFile(BaseModel):
    model_config = ConfigDict(extra="forbid")

    tokens: list[_Entry]


class Tokens:
    """The tokens of a file, which is looked at again once a second."""

    def __init__(self, path: str | Path) -> None:
        """Raises ValueError for a file that cannot be read, or that others may write."""
        self._path = Path(path)
        self._entries, self._stamp = _read(self._path)
        self._looked = time.monotonic()

    def scopes(self, token: bytes) -> frozenset[str] | None:
        """What the token is good for; None for a token that nobody has."""
        self._look()
        digest = hashlib.sha256(token).hexdigest()
        found = None
        for entry in self._entries:  # all of them: the time must not tell which one was near
            if hmac.compare_digest(entry.sha256, digest):
                found = frozenset[str](entry.scopes)
        return found

    def _look(self) -> None:
        now = time.monotonic()
        if now - self._looked < _LOOK_EVERY_S:
            return
        self._looked = now
        try:
            if _stamp(self._path) == self._stamp:
                return
            self._entries, self._stamp = _read(self._path)
        except (OSError, ValueError) as error:
            logger.error("the tokens stay what they were: %s", error)
            return
        logger.warning("%d tokens read from %s", len(self._entries), self._path)


def _stamp(path: Path) -> tuple[int, int, int]:
    """Differs once the file has been changed or replaced."""
    found = path.stat()
    return found.st_mtime_ns, found.st_ino, found.st_size


def _read(path: Path) -> tuple[list[_Entry], tuple[int, int, int]]:
    """The entries, and the stamp of what was read. Raises ValueError."""
    try:
        stamp = _stamp(path)
        mode = path.stat().st_mode
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"token_file {path} cannot be read ({error.strerror})") from None
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ValueError(
            f"token_file {path} can be written by others, who could let themselves in; "
            f"run: chmod 600 {path}"
        )
    if mode & stat.S_IROTH:
        logger.warning("%s can be read by everybody on this machine; chmod 600 it", path)
    try:
        return _TokenFile.model_validate_json(content).tokens, stamp
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise ValueError(f"token_file {path}: {place}: {first['msg']}") from None


def add_token(path: Path, name: str, scopes: Sequence[TokenScope], *, replace: bool = False) -> str:
    """Make a token, write its digest into the file (mode 0600), and return it: it is nowhere else.

    Tokens of the same name stay valid, so that it can be handed out before the old one ends;
    `replace` ends them at once. Raises ValueError.
    """
    entries = _read(path)[0] if path.exists() else []
    if replace:
        entries = [entry for entry in entries if entry.name != name]
    token = f"rw_{secrets.token_urlsafe(32)}"
    digest = hashlib.sha256(token.encode()).hexdigest()
    try:
        entries = [*entries, _Entry(name=name, sha256=digest, scopes=list(scopes))]
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ValueError(f"{first['loc'][0]}: {first['msg']}") from None
    text = json.dumps(_TokenFile(tokens=entries).model_dump(), indent=2) + "\n"
    replace_text(path, text, mode=0o600)
    return token


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
            "or say that nobody else can reach it with --allow-unauthenticated true"
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
