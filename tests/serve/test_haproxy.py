"""The real HAProxy under a configuration like Ray's, by the script that changes it."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from isolation import free_port

from reward_actor.schema import ErrorReply
from serve.haproxy import settings

# The lines of Ray's configuration that loopback.sh changes, and what HAProxy needs besides.
CONFIG = """
global
    log stdout format raw local0
defaults
    mode http
    timeout connect 1s
    timeout client 5s
    timeout server 5s
    errorfile 502 /nowhere/500.http
    errorfile 503 /nowhere/500.http
    errorfile 504 /nowhere/500.http
frontend http_frontend
    bind *:{port}
    default_backend ingresses
backend ingresses
    server ended 127.0.0.1:1
"""


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    """Of one whose service has no ingress."""
    assert os.environ["RAY_SERVE_ENABLE_HA_PROXY"] == "1"  # since the tests began
    assert settings.enable() is None, "the folder is another's"
    port, config = free_port(), tmp_path / "haproxy.cfg"
    config.write_text(CONFIG.format(port=port))
    command = [os.environ["RAY_SERVE_HAPROXY_BINARY_PATH"], "-db", "-f", str(config)]
    # With what the tests' own services are started with, but for an address that is theirs.
    environment = {**os.environ, "RAYWARD_LISTEN": ""}
    with subprocess.Popen(command, env=environment) as running:
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            running.kill()


def ask(url: str, **headers: str) -> httpx.Response:
    deadline = time.monotonic() + 20
    while True:
        try:
            return httpx.get(f"{url}/v1/models", headers=headers, timeout=10)
        except httpx.ConnectError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


@pytest.mark.process
def test_what_haproxy_answers_itself_says_what_it_is_and_of_which_request(url: str) -> None:
    for given in ({}, {"X-Request-Id": "no id"}):
        reply = ask(url, **given)
        assert reply.status_code == 503
        assert reply.headers["Retry-After"] == "1"
        error = ErrorReply.model_validate(reply.json()).error
        assert (error.type, error.retryable) == ("unavailable", True)
        assert "its Ray cluster has ended" in error.message
        [made] = reply.headers.get_list("x-request-id")
        assert re.fullmatch(r"[A-Za-z0-9_-]{1,64}", made)
    named = ask(url, **{"X-Request-Id": "step-7"})
    assert named.headers.get_list("x-request-id") == ["step-7"]
