"""Who holds a port."""

from __future__ import annotations

import os
import socket

import pytest

from serve.listeners import listeners


@pytest.mark.parametrize(
    ("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")]
)
def test_who_listens_on_a_port_is_found(family: socket.AddressFamily, host: str) -> None:
    with socket.socket(family) as ours:
        ours.bind((host, 0))
        port = ours.getsockname()[1]
        assert listeners(port) == [], "it does not listen yet"
        ours.listen()
        [found] = listeners(port)
        assert found.startswith(f"process {os.getpid()} (")
        assert "pytest" in found
    assert listeners(port) == []
