"""The tokens of a service's callers, in a file that holds their digests, never themselves:

    {"tokens": [{"name": "trainer", "sha256": "<64 hex digits>", "scopes": ["score"]}, ...]}

It is read again when it changes, so that tokens come and go without a restart. No server package is
imported here: `rayward token` needs none.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import secrets
import stat
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from reward_actor.atomic import replace_text

logger = logging.getLogger("ray.serve")

TokenScope = Literal["score", "admin"]

# How old what is known of the file may be.
_LOOK_EVERY_S = 1.0


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
