"""A service with TLS, tokens and a registry of its own: who gets in, what is open, what is told."""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import httpx
import psutil
import pytest
from applications import application
from pickles import with_pickled_weights
from processes import titled
from secured import Secured, secured_service
from traversal import NAMES

from serve.http.tokens import add_token

if TYPE_CHECKING:
    from nursery import Nursery

pytestmark = pytest.mark.process

CANARY = "canary7f3a"
# All that a replica's own port answers to; the first of them unpickles what it gets.
ASGI_METHODS = [
    f"HandleRequest{rejection}{streaming}"
    for rejection in ("", "WithRejection")
    for streaming in ("", "Streaming")
]
GROUP = {"prompt": "Name two fruits.", "completions": ["An apple and a pear.", "A hammer."]}


@pytest.fixture(scope="module")
def secured(export_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    directory = tmp_path_factory.mktemp("secured")
    # As a user starts it, imports included.
    with secured_service(sys.executable, export_dir, directory) as service:
        yield service


@pytest.fixture(scope="module")
def trainer(secured: Secured) -> Iterator[httpx.Client]:
    with secured.client(secured.score) as client:
        yield client


@pytest.fixture(scope="module")
def operator(secured: Secured) -> Iterator[httpx.Client]:
    with secured.client(secured.admin) as client:
        yield client


def test_each_scope_opens_what_it_is_for(
    secured: Secured, trainer: httpx.Client, operator: httpx.Client
) -> None:
    assert trainer.post("/v1/score", json={"groups": [GROUP]}).status_code == 200
    assert trainer.get("/info").status_code == 200
    assert trainer.get("/v1/admin/models").status_code == 403
    assert operator.get("/v1/admin/models").json()["models"] == ["first"]
    assert operator.post("/v1/score", json={"groups": [GROUP]}).status_code == 403
    with secured.client() as nobody, secured.client("rw_wrong") as stranger:
        assert nobody.get("/health").status_code == 200
        assert nobody.get("/ready").status_code == 200
        for client in (nobody, stranger):
            refused = client.post("/v1/score", json={"groups": [GROUP]})
            assert refused.status_code == 401
            assert refused.headers["WWW-Authenticate"].startswith("Bearer")


def test_tokens_rotate_while_it_serves(secured: Secured) -> None:
    before = secured.token_file.read_text()
    with secured.client(add_token(secured.token_file, "new", ["score"])) as client:
        wait_for(lambda: client.get("/info").status_code == 200)
        secured.token_file.write_text(before)
        wait_for(lambda: client.get("/info").status_code == 401)


def wait_for(met: Any, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not met():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_nothing_is_spoken_but_tls_of_its_certificate(secured: Secured) -> None:
    address = ("127.0.0.1", httpx.URL(secured.url).port)
    with pytest.raises(httpx.TransportError):
        httpx.get(secured.url.replace("https", "http") + "/health")
    with pytest.raises(httpx.ConnectError, match="certificate"):
        httpx.get(secured.url + "/health")
    with socket.create_connection(address) as plain:
        context = ssl.create_default_context(cafile=secured.cert)
        with context.wrap_socket(plain, server_hostname="127.0.0.1") as wrapped:
            assert wrapped.version() in ("TLSv1.2", "TLSv1.3")


def listening(secured: Secured) -> list[tuple[str, int, str]]:
    """Address, port and process of every TCP socket that waits for connections."""
    found = []
    for process in secured.processes():
        name = " ".join(process.cmdline())
        for connection in process.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN:
                ip = connection.laddr.ip.removeprefix("::ffff:")
                found.append((ip, connection.laddr.port, name))
    return found


def is_haproxy(name: str) -> bool:
    return name.partition(" ")[0].endswith("/haproxy")


def test_every_socket_is_on_loopback_but_the_replicas_own(secured: Secured) -> None:
    """Ray Serve binds one gRPC port of each replica to all interfaces and lets nobody choose; who
    calls it without Ray's token is refused."""
    open_to_others = [(port, name) for ip, port, name in listening(secured) if ip != "127.0.0.1"]
    assert all("ray::ServeReplica" in name for _, name in open_to_others)
    assert len(open_to_others) == len(secured.replica_pids()) == 3
    for port, _ in open_to_others:
        for method in ASGI_METHODS:
            with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
                call = channel.unary_stream(f"/ray.serve.ASGIService/{method}")
                with pytest.raises(grpc.RpcError) as refused:
                    list(call(b"", timeout=30))
            assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED
    names = " ".join(name for _, _, name in listening(secured))
    for part in ("/haproxy ", "gcs_server", "raylet", "ProxyActor", "DashboardAgent"):
        assert part in names, f"this test did not see {part}"


def test_only_its_user_may_control_haproxy(secured: Secured) -> None:
    [admin] = [p for p in secured.temporary.rglob("admin.sock") if p.is_socket()]
    assert stat.S_IMODE(admin.stat().st_mode) == 0o600
    assert stat.S_IMODE(admin.parents[1].stat().st_mode) == 0o700


def test_a_handle_in_another_process_finds_the_cluster(nursery: Nursery, secured: Secured) -> None:
    """A cluster that listens on 127.0.0.1 only is not where Ray would look for it by itself."""
    script = (
        "import sys; from reward_actor import RewardHandle, Group\n"
        "from reward_actor.cluster import connect\n"
        "connect(0, address=sys.argv[1], log_to_driver=False)\n"
        "print(RewardHandle().score('Name two fruits.', ['An apple and a pear.']).rewards)\n"
    )
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "RAYWARD_"))}
    done = subprocess.run(
        [nursery.python, "-c", script, secured.ray_address],
        capture_output=True,
        text=True,
        timeout=120,
        env=clean | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    [reward] = json.loads(done.stdout.splitlines()[-1])
    with secured.client(secured.score) as client:
        served = client.post("/v1/score", json={"groups": [GROUP]}).json()
    assert reward == pytest.approx(served["results"][0]["rewards"][0], abs=1e-5)


def test_two_hundred_traversal_names_are_refused(secured: Secured, operator: httpx.Client) -> None:
    pids = secured.replica_pids()
    model_version = operator.get("/ready").json()["model_version"]
    for name in NAMES:
        body = json.dumps({"model": name})
        reply = operator.post("/v1/admin/models", content=body)
        assert reply.status_code in (404, 422), name
        message = reply.json()["error"]["message"]
        assert str(secured.registry) not in message
        assert len(name) < 12 or name not in message
    assert operator.get("/ready").json()["model_version"] == model_version
    assert operator.get("/v1/admin/models").json()["current"] == "reward-model"
    assert secured.replica_pids() == pids


def test_a_pickle_in_the_registry_is_not_swapped_in(
    secured: Secured, operator: httpx.Client, export_dir: Path, tmp_path: Path
) -> None:
    mark = tmp_path / "mark"
    with_pickled_weights(export_dir, secured.registry / "pickled", mark)
    assert "pickled" in operator.get("/v1/admin/models").json()["models"]
    refused = operator.post("/v1/admin/models", json={"model": "pickled"})
    assert refused.status_code == 409
    assert "pickle" in refused.json()["error"]["message"]
    assert str(secured.registry) not in refused.text
    assert not mark.exists()


def test_pages_of_other_origins_get_nothing_to_read(secured: Secured) -> None:
    headers = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    with secured.client() as browser:
        for reply in (
            browser.options("/v1/score", headers=headers),
            browser.post("/v1/score", headers=headers, json={"groups": [GROUP]}),
        ):
            assert reply.status_code in (401, 405)
            assert not [name for name in reply.headers if name.startswith("access-control")]


def test_prompts_and_tokens_are_in_no_log_and_no_metric(
    secured: Secured, trainer: httpx.Client, operator: httpx.Client
) -> None:
    """Over every route, well-formed and not, with a replica killed under a request."""
    pids = secured.replica_pids()
    with secured.client(f"rw_{CANARY}") as stranger, secured.client() as nobody:
        clients = (trainer, operator, stranger, nobody)
        paths = {route.path for route in application().routes}
        for path in paths - {"/v1/admin/sleep"}:  # it reads no body, and nothing would be scored
            for client in clients:
                for body in canaries():
                    reply = client.post(path, content=body, headers={"X-Test": CANARY})
                    assert reply.status_code < 500, (path, body, reply.text)
            trainer.get(f"{path}?token={CANARY}")
    assert secured.replica_pids() == pids
    kill_a_replica_under(secured, trainer)
    metrics = ""
    for ip, port, name in listening(secured):
        if is_haproxy(name) or "Agent" in name:
            for path in ("/metrics", "/stats"):
                try:
                    metrics += httpx.get(f"http://{ip}:{port}{path}", timeout=5).text
                except httpx.HTTPError:  # another protocol
                    continue
    assert "serve_" in metrics
    assert "haproxy_" in metrics
    secrets = {CANARY: "a canary", secured.score: "a token", secured.admin: "a token"}
    for secret, what in secrets.items():
        assert secret not in metrics, f"{what} is in the metrics"
        for file in secured.log_files():
            assert secret.encode() not in file.read_bytes(), f"{what} is in {file}"
    assert len(secured.log_files()) > 20


def canaries() -> list[str]:
    """Bodies that score, that fail in each part of the service, and that are nothing at all."""
    ids = {"prompt_ids": [1], "completion_ids": [[2], [10**6], [], [3] * 999]}
    odd = [{"role": CANARY, "content": CANARY}, {"role": "system", "content": CANARY}]
    bodies: list[Any] = [
        {"groups": [{"prompt": CANARY, "completions": [CANARY, CANARY * 500, "\ud800" + CANARY]}]},
        {"groups": [{"prompt": odd, "completions": [CANARY]}, ids]},
        {"groups": [{"prompt": CANARY, "completions": [CANARY], CANARY: CANARY}]},
        {"groups": [{"prompt": [{"role": "user", CANARY: 1}], "completions": 7}]},
        {"groups": [], "model": CANARY},
        {"model": CANARY},
        {"prompt": CANARY, "completions": [CANARY]},
        {CANARY: CANARY},
        [CANARY],
        CANARY,
        {"query": [CANARY], "prompts": [CANARY], "labels": [CANARY]},
        {"input": CANARY, "text": [CANARY], "messages": odd, "inputs": CANARY},
    ]
    return [*map(json.dumps, bodies), CANARY, "{" + CANARY, f'{{"groups": "{CANARY}']


def kill_a_replica_under(secured: Secured, client: httpx.Client) -> None:
    long = {"prompt": CANARY, "completions": [f"{CANARY} {n}" * 4 for n in range(200)]}
    replies = []

    def post() -> None:
        replies.append(client.post("/v1/score", json={"groups": [long] * 3}).status_code)

    [victim, *_] = titled("ray::ServeReplica:rayward:RewardModel", secured.processes())
    thread = threading.Thread(target=post)
    thread.start()
    time.sleep(0.1)
    os.kill(victim.pid, signal.SIGKILL)
    thread.join()
    assert replies == [200]
    # By then Ray has written about it.
    wait_for(lambda: victim.pid not in (now := secured.replica_pids()) and len(now) == 3, 60)


@pytest.mark.long
def test_one_port_faces_the_network_where_the_service_does(
    nursery: Nursery, export_dir: Path, tmp_path: Path
) -> None:
    options = ["--host", "0.0.0.0"]
    with secured_service(nursery.python, export_dir, tmp_path, *options) as open_service:
        port = httpx.URL(open_service.url).port
        others = {
            (port, is_haproxy(name))
            for ip, port, name in listening(open_service)
            if ip != "127.0.0.1" and "ray::ServeReplica" not in name
        }
        assert others == {(port, True)}


@pytest.mark.long
def test_tls_without_haproxy(nursery: Nursery, export_dir: Path, tmp_path: Path) -> None:
    """Ray Serve's own proxy reads the certificate then."""
    with (
        secured_service(
            nursery.python, export_dir, tmp_path, RAY_SERVE_ENABLE_HA_PROXY="0"
        ) as plain,
        plain.client(plain.score) as client,
    ):
        assert client.post("/v1/score", json={"groups": [GROUP]}).status_code == 200
        assert not [name for _, _, name in listening(plain) if is_haproxy(name)]
