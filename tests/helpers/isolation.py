"""What keeps clusters and services of one machine apart."""

from __future__ import annotations

import os

from serve.haproxy.settings import free_ports


def free_port() -> int:
    return free_ports(1)[0]


def environment_for_a_cluster() -> dict[str, str]:
    """The environment for a process that starts a cluster of its own: without what the tests'
    cluster has set for itself, the ports of its HAProxy above all."""
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY")}
