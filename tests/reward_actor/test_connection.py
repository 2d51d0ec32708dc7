"""The way to an endpoint: token, TLS, proxy, and connections whose other end has vanished."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import sys
import time
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from proxy import proxy
from stub_service import Answer, Received, error, stub

from reward_actor import RewardClient
from reward_actor.client import connection as sender
from reward_actor.errors import RewardServiceError

SECRET = "secret-token-0123456789"


@pytest.mark.parametrize("by", ["argument", "environment"])
def test_the_token_is_sent_and_never_shown(by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {}
    if by == "argument":
        options["token"] = SECRET
    else:
        monkeypatch.setenv("RAYWARD_TOKEN", SECRET + "\n")  # as a file ends
    with (
        stub(lambda _: error("unauthenticated")) as server,
        RewardClient(server.url, **options) as client,
    ):
        with pytest.raises(RewardServiceError) as refused:
            client.score("a secret prompt", ["a secret completion"])
        assert server.received[0].headers["authorization"] == f"Bearer {SECRET}"
        shown = f"{refused.value!r} {refused.value} {client!r} {client._client!r}"
    with (
        RewardClient(server.url, timeout_s=0.5, **options) as client,
        pytest.raises(RewardServiceError) as gone,
    ):
        client.score("a secret prompt", ["a secret completion"])
    assert "secret" not in shown + repr(gone.value)


@pytest.mark.parametrize("token", ["two words", "line\nbreak", "ünïcode", "\x00"])
def test_a_token_that_no_header_can_hold_is_refused_unseen(token: str) -> None:
    with pytest.raises(ValueError, match="printable ASCII") as refused:
        RewardClient("http://127.0.0.1:1", token=token)
    assert token not in str(refused.value)


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that signs itself, and its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "a test")])
    address = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(address, critical=False)
        .sign(key, hashes.SHA256())
    )
    pem, key_pem = tmp_path / "cert.pem", tmp_path / "key.pem"
    pem.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    key_pem.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return pem, key_pem


def test_https_trusts_the_authorities_that_it_is_given(certificate: tuple[Path, Path]) -> None:
    pem, key = certificate
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem, key)
    with stub(context=context) as server:
        for verify in (str(pem), False, ssl.create_default_context(cafile=pem)):
            with RewardClient(server.url, verify=verify) as client:
                assert client.score("p", ["xyz"]).rewards == [3.0]
        started = time.monotonic()
        with RewardClient(server.url) as client, pytest.raises(RewardServiceError) as refused:
            client.score("p", ["x"])
        assert "certificate is not trusted" in refused.value.message
        assert time.monotonic() - started < 5
    with pytest.raises(ValueError, match="verify is"):
        RewardClient("https://127.0.0.1", verify="/nowhere.pem")


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Without proxies, whatever the machine has."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    return monkeypatch


def port_of(url: str) -> int:
    port = urlsplit(url).port
    assert port is not None
    return port


def test_the_environments_proxy_is_used_but_not_past_no_proxy(
    environment: pytest.MonkeyPatch,
) -> None:
    with stub() as server, proxy(port_of(server.url)) as through:
        environment.setenv("HTTP_PROXY", through.url)
        with RewardClient("http://rewards.invalid") as client:
            assert client.score("p", ["xyz"]).rewards == [3.0]
        assert through.asked == ["POST http://rewards.invalid/v1/score HTTP/1.1"]
        environment.setenv("NO_PROXY", "rewards.invalid")
        assert sender.proxies(["http://rewards.invalid"]) == {"http://rewards.invalid": None}


@pytest.mark.parametrize("no_proxy", [None, "", "example.com"])
def test_this_machine_is_never_asked_through_a_proxy(
    environment: pytest.MonkeyPatch, no_proxy: str | None
) -> None:
    if no_proxy is not None:
        environment.setenv("NO_PROXY", no_proxy)
    hosts = ("127.0.0.1", "127.1.2.3", "[::1]", "localhost", "LOCALHOST")
    with stub() as server, proxy(status=403) as refusing:
        for variable in ("HTTP_PROXY", "https_proxy", "ALL_PROXY"):
            environment.setenv(variable, refusing.url)
        found = sender.proxies([f"{s}://{h}:8000" for s in ("http", "https") for h in hosts])
        assert len(found) == 10
        assert not any(found.values())
        environment.setenv("HTTP_PROXY", "foo://broken")
        with RewardClient(server.url) as client:
            assert client.score("p", ["xyz"]).rewards == [3.0]
        assert refusing.asked == []


@pytest.mark.parametrize(("scheme", "variable"), [("http", "HTTP_PROXY"), ("https", "all_proxy")])
@pytest.mark.parametrize("status", [403, 407, 502])
def test_what_a_proxy_refuses_is_not_said_of_the_service(
    environment: pytest.MonkeyPatch, scheme: str, variable: str, status: int
) -> None:
    url = f"{scheme}://rewards.invalid"
    with proxy(status=status) as refusing:
        at = refusing.url.removeprefix("http://")
        environment.setenv(variable, f"http://me:{SECRET}@{at}")
        with RewardClient(url, timeout_s=2.0) as client:
            for call in (client.check_reachable, client.info):
                with pytest.raises(RewardServiceError) as refused:
                    call()
                assert refused.value.message.startswith(
                    f"the proxy http://{at} ({variable}) answered {status} in place of {url}; "
                )
                assert refused.value.message.endswith("add rewards.invalid to NO_PROXY")
                assert refused.value.type == "unavailable"
                assert refused.value.retryable == (status == 502)
                assert "secret" not in f"{refused.value!r}".lower()
    assert len(refusing.asked) == 2 or status == 502


def test_what_the_service_refuses_is_not_said_of_the_proxy(
    environment: pytest.MonkeyPatch,
) -> None:
    def refuse(received: Received) -> Answer:
        if received.path == "/info":
            return error("forbidden", X_Request_Id="a1")
        return Answer(404, b"not ours", {"X-Request-Id": "a2"})

    with stub(refuse) as server, proxy(port_of(server.url)) as through:
        environment.setenv("http_proxy", through.url.removeprefix("http://"))
        with (
            RewardClient("http://rewards.invalid") as client,
            pytest.raises(RewardServiceError, match=r"^forbidden: as the test wants it$"),
        ):
            client.info()
        with (
            RewardClient("http://rewards.invalid") as client,
            pytest.raises(RewardServiceError, match=r"^not_found: http://rewards.invalid "),
        ):
            client.models()
        assert len(through.asked) == 2


def test_a_tunnel_through_a_proxy_is_the_services_own(
    environment: pytest.MonkeyPatch, certificate: tuple[Path, Path]
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    with stub(context=context) as server, proxy(port_of(server.url)) as through:
        environment.setenv("HTTPS_PROXY", through.url)
        with RewardClient("https://rewards.invalid", verify=False) as client:
            assert client.score("p", ["xyz"]).rewards == [3.0]
            with pytest.raises(RewardServiceError, match=r"^not_found: https://rewards.invalid "):
                client.info()
        assert through.asked == ["CONNECT rewards.invalid:443 HTTP/1.1"]
        with (
            RewardClient("https://rewards.invalid") as client,
            pytest.raises(RewardServiceError, match=r"through the proxy .* certificate is not"),
        ):
            client.info()


def test_a_proxy_that_is_not_there_is_named(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    with (
        RewardClient("http://rewards.invalid") as client,
        pytest.raises(RewardServiceError, match=r"through the proxy http://127.0.0.1:1 \(HTTP_PRO"),
    ):
        client.check_reachable()


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("foo://me:secret@x", "has the scheme 'foo'"),
        ("http://", "has the scheme 'http' and the host ''"),
        ("http://me:secret@host:port", "is no URL"),
        ("socks5://me:secret@x:1080", r'names a SOCKS proxy, .* `pip install "httpx\[socks\]"`'),
    ],
)
def test_a_variable_that_names_no_proxy_is_named(
    environment: pytest.MonkeyPatch, value: str, said: str
) -> None:
    environment.setitem(sys.modules, "socksio", None)
    environment.setenv("ALL_PROXY", value)
    with pytest.raises(ValueError, match=rf"^ALL_PROXY {said}.*; correct or unset it, or") as no:
        RewardClient("http://rewards.invalid")
    assert "secret" not in str(no.value)


def test_data_that_nobody_acknowledges_ends_its_connection() -> None:
    """A machine that has vanished gets no probes while it owes acknowledgements."""
    with stub() as server:

        async def call() -> None:
            async with (
                sender.connect(server.url, None, True) as connection,
                connection.stream("GET", "/info") as reply,
            ):
                found = reply.extensions["network_stream"].get_extra_info("socket")
                for name, value in {"TCP_USER_TIMEOUT": 30_000, "TCP_KEEPIDLE": 10}.items():
                    assert found.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) == value
                assert found.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)

        asyncio.run(call())


def test_a_request_that_is_stuck_on_its_way_is_an_error_of_the_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a second instead of half a minute, and a peer that takes in nothing."""
    monkeypatch.setitem(sender._PROBES, "TCP_USER_TIMEOUT", 1000)
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        url = f"http://127.0.0.1:{deaf.getsockname()[1]}"

        async def call() -> None:
            async with sender.connect(url, None, True) as connection:
                with pytest.raises(httpx.TransportError):
                    await connection.post("/", content=b"x" * 2**24)

        asyncio.run(asyncio.wait_for(call(), 20))


def test_a_system_without_these_options_has_connections_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in sender._PROBES:
        monkeypatch.delattr(socket, name)
    with stub() as server, RewardClient(server.url) as client:
        assert client.score("p", ["xyz"]).rewards == [3.0]
