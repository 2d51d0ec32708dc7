"""The real HAProxy under a configuration like Ray's, by the script that changes it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from isolation import free_port

import serve.haproxy

CONFIG = """
global
    log stdout format raw local0
defaults
    mode http
    timeout connect 1s
    timeout client 5s
    timeout server 5s
frontend http_frontend
    bind *:{port}
    default_backend nobody
backend nobody
"""


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    """Of one whose service has no ingress."""
    script = Path(serve.haproxy.__file__).with_name("loopback.sh")
    config = tmp_path / "haproxy.cfg"
    port = free_port()
    config.write_text(CONFIG.format(port=port))
    # With what the tests' own services are started with, but for an address that is theirs.
    environment = {k: v for k, v in os.environ.items() if k != "RAYWARD_LISTEN"}
    shell = shutil.which("sh")
    assert shell is not None
    with subprocess.Popen([shell, script, "-db", "-f", config], env=environment) as running:
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            running.terminate()


@pytest.mark.process
def test_what_haproxy_answers_itself_has_the_id_of_its_request(url: str) -> None:
    def ask(**headers: str) -> httpx.Response:
        deadline = time.monotonic() + 10
        while True:
            try:
                return httpx.get(url, headers=headers)
            except httpx.ConnectError:
                assert time.monotonic() < deadline
                time.sleep(0.05)

    for given in ({}, {"X-Request-Id": "no id"}):
        reply = ask(**given)
        assert reply.status_code == 503
        [made] = reply.headers.get_list("x-request-id")
        assert re.fullmatch(r"[A-Za-z0-9_-]{1,64}", made)
    assert ask(**{"X-Request-Id": "step-7"}).headers.get_list("x-request-id") == ["step-7"]
