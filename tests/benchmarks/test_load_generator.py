"""The load generator against a real server in this process: counts, percentiles, rates."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.serving.http_reply import ReplyParser
from benchmarks.serving.load import (
    Plan,
    Record,
    Request,
    loopback,
    main,
    percentile,
    put_on,
    summarize,
)

pytestmark = pytest.mark.alone

REQUEST = Request("/score", "application/json", b'{"n": 1}', num_tokens=10)


def plan(port: int, **fields: Any) -> Plan:
    defaults: dict[str, Any] = {
        "connections": 1,
        "new_connections": False,
        "rate": None,
        "seed": 0,
        "warm_up_s": 0.0,
        "duration_s": 0.5,
        "max_requests": 10_000,
        "timeout_s": 5.0,
    }
    return Plan("127.0.0.1", port, **{**defaults, **fields})


class Server:
    """Answers after `delay_s`, one request at a time where `lock` says so."""

    def __init__(self, delay_s: float, *, lock: bool = False, chunked: bool = False) -> None:
        self.delay_s = delay_s
        self.statuses: list[int] = []  # of the next replies; then 200
        self.num_connections = 0
        self.bodies: list[bytes] = []
        self._lock = asyncio.Lock() if lock else None
        self._chunked = chunked

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        while True:
            try:
                head = await reader.readuntil(b"\r\n\r\n")
            except (asyncio.IncompleteReadError, ConnectionError):
                writer.close()
                return
            fields = dict(line.split(": ") for line in head.decode().split("\r\n")[1:-2])
            self.bodies.append(await reader.readexactly(int(fields["Content-Length"])))
            if self._lock is None:
                await asyncio.sleep(self.delay_s)
            else:
                async with self._lock:
                    await asyncio.sleep(self.delay_s)
            status = self.statuses.pop(0) if self.statuses else 200
            start = f"HTTP/1.1 {status} Fine\r\n".encode()
            if self._chunked:
                rest = b"Transfer-Encoding: chunked\r\n\r\n3\r\n{ }\r\n0\r\n\r\n"
            else:
                rest = b"content-length: 2\r\n\r\n{}"
            writer.write(start + rest)
            if fields["Connection"] == "close":
                writer.close()
                return


@asynccontextmanager
async def running(server: Server) -> AsyncIterator[int]:
    async with await asyncio.start_server(server.serve, "127.0.0.1", 0) as listener:
        yield listener.sockets[0].getsockname()[1]


def measured(
    make: Callable[[], Server], *requests: Request, **fields: Any
) -> tuple[dict[str, Any], Server]:
    async def run() -> tuple[dict[str, Any], Server]:
        server = make()
        async with running(server) as port:
            return await put_on(plan(port, **fields), list(requests) or [REQUEST]), server

    return asyncio.run(run())


def test_a_closed_loop_asks_again_when_it_is_answered() -> None:
    figures, server = measured(lambda: Server(0.02), connections=4, duration_s=1.0)
    assert figures["statuses"].keys() == {"200"}
    assert 20 <= figures["p50_ms"] <= 40
    assert figures["p50_ms"] <= figures["p90_ms"] <= figures["p99_ms"] <= figures["max_ms"]
    in_flight = figures["requests_per_s"] * figures["mean_ms"] / 1e3  # Little's law
    assert in_flight == pytest.approx(4, rel=0.1)
    assert figures["tokens_per_s"] == pytest.approx(10 * figures["requests_per_s"])
    assert server.num_connections == 4


def test_a_new_connection_for_each_request() -> None:
    figures, server = measured(lambda: Server(0), new_connections=True, max_requests=7)
    assert server.num_connections == 7 == len(server.bodies)
    assert figures["num_repeated"] == 6


def test_requests_are_sent_in_order_and_again_from_the_beginning() -> None:
    requests = [Request("/", "text/plain", bytes([i]), 1) for i in range(3)]
    _, server = measured(lambda: Server(0, chunked=True), *requests, max_requests=7)
    assert server.bodies == [bytes([i % 3]) for i in range(7)]
    assert server.num_connections == 1


def test_warm_up_is_not_measured() -> None:

    def make() -> Server:
        server = Server(0.01)
        server.statuses = [503] * 5
        return server

    figures, server = measured(make, warm_up_s=0.3, duration_s=0.3)
    assert figures["statuses"].keys() == {"200"}
    assert figures["num_requests"] < len(server.bodies)
    assert figures["window_s"] == pytest.approx(0.3)


def test_refusals_are_counted_and_are_no_throughput() -> None:
    def make() -> Server:
        server = Server(0.01)
        server.statuses = [429, 200] * 500
        return server

    figures, _ = measured(make)
    assert figures["statuses"]["429"] == pytest.approx(figures["statuses"]["200"], abs=1)
    assert figures["requests_per_s"] < 0.6 * figures["num_requests"] / figures["window_s"]


def test_arrivals_come_at_their_rate_whoever_is_late() -> None:
    """One at a time, 10 ms each: 50 arrivals a second find it busy half the time."""
    fields: dict[str, Any] = {"rate": 50.0, "connections": 64, "duration_s": 3.0}
    figures, _ = measured(lambda: Server(0.01, lock=True), **fields)
    assert figures["num_requests"] / figures["window_s"] == pytest.approx(50, rel=0.3)
    assert figures["p99_ms"] > 1.5 * figures["p50_ms"] > 15
    again, _ = measured(lambda: Server(0.01, lock=True), **fields)
    assert again["num_requests"] == pytest.approx(figures["num_requests"], abs=3)


def test_latency_counts_from_when_a_request_was_due() -> None:
    """200 a second into a server of 100 a second: they wait ever longer, and all of it counts."""
    figures, _ = measured(
        lambda: Server(0.01), rate=200.0, connections=1, duration_s=0.5, max_requests=1000
    )
    assert figures["max_ms"] > 300
    assert figures["p50_ms"] > 100


def test_a_server_that_hangs_or_breaks_off_counts_as_failed() -> None:
    async def run(serve: Callable[..., Awaitable[None]]) -> str:
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as listener:
            port = listener.sockets[0].getsockname()[1]
            with pytest.raises(ValueError, match="nothing was answered") as refused:
                await put_on(plan(port, duration_s=0.2, timeout_s=0.1), [REQUEST])
            return str(refused.value)

    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async def break_off(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(10)
        writer.close()

    async def babble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(10)
        writer.write(b"hello there\r\n\r\n")
        writer.close()

    for serve in (hang, break_off, babble):
        assert "'failed'" in asyncio.run(run(serve))


replies = st.sampled_from(["length", "chunks", "empty"])


@given(st.lists(st.tuples(st.integers(200, 599), replies, st.binary(max_size=40)), max_size=5))
def test_replies_are_told_apart_however_they_arrive(
    sent: list[tuple[int, str, bytes]],
) -> None:
    parser = ReplyParser()
    found = []
    for status, kind, body in sent:
        head = f"HTTP/1.1 {status} X\r\nServer: x\r\n".encode()
        match kind:
            case "length":
                whole = head + b"Content-LENGTH: %d\r\n\r\n%s" % (len(body), body)
            case "empty":
                whole = head + b"content-length: 0\r\n\r\n"
            case _:
                chunk = b"%x;x=y\r\n%s\r\n" % (len(body), body) if body else b""
                whole = head + b"Transfer-Encoding: chunked\r\n\r\n" + chunk + b"0\r\n\r\n"
        answers = [parser.feed(whole[i : i + 1]) for i in range(len(whole))]
        assert answers[:-1] == [None] * (len(whole) - 1)
        found.append(answers[-1])
    assert found == [status for status, _, _ in sent]


def test_a_reply_may_end_with_its_connection() -> None:
    parser = ReplyParser()
    assert parser.feed(b"HTTP/1.0 200 OK\r\n\r\nsome") is None
    assert not parser.keeps_alive
    assert parser.end() == 200


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0.01, 1))
def test_a_percentile_is_a_value_that_its_share_does_not_exceed(
    values: list[float], share: float
) -> None:
    ordered = sorted(values)
    found = percentile(ordered, share)
    assert sum(value <= found for value in values) >= share * len(values) - 1e-6
    assert sum(value < found for value in values) < math.ceil(share * len(values))


def test_throughput_counts_the_share_within_the_window() -> None:
    records = [
        Record(0.0, 4.0, 200, 100),  # half of it within
        Record(3.0, 5.0, 200, 100),
        Record(5.0, 9.0, 200, 100),  # a quarter within
        Record(4.0, 5.0, 500, 100),
    ]
    figures = summarize(records, 2.0, 6.0)
    assert figures["num_requests"] == 3
    assert figures["statuses"] == {"200": 2, "500": 1}
    assert figures["requests_per_s"] == pytest.approx(1.75 / 4)
    assert figures["tokens_per_s"] == pytest.approx(175 / 4)
    assert (figures["p50_ms"], figures["max_ms"]) == (2000, 4000)


def test_a_window_shorter_than_a_request_is_said() -> None:
    with pytest.raises(ValueError, match="longer --duration-s"):
        measured(lambda: Server(0.5), warm_up_s=0.1, duration_s=0.2)


def test_what_began_in_the_warm_up_counts_by_its_share() -> None:
    """0.3 s each, the window from 0.2 to 0.5: a request a window's length, wherever it begins."""
    figures, _ = measured(lambda: Server(0.3), warm_up_s=0.2, duration_s=0.3)
    assert figures["requests_per_s"] == pytest.approx(1 / 0.3, rel=0.15)


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("http://example.org:80", "not a loopback"),
        ("http://192.168.0.1:80", "not a loopback"),
        ("https://127.0.0.1:80", "http://HOST:PORT"),
        ("http://127.0.0.1", "http://HOST:PORT"),
        ("http://127.0.0.1:80/score", "http://HOST:PORT"),
    ],
)
def test_load_is_for_this_machine_alone(
    url: str, why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=why):
        loopback(url)
    bodies = tmp_path / "bodies.jsonl"
    bodies.write_text(REQUEST.to_line())
    with pytest.raises(SystemExit):
        main([url, str(bodies)])
    assert why in capsys.readouterr().err


def test_bodies_come_back_from_their_file() -> None:
    binary = Request("/v1/score", "application/octet-stream", bytes(range(256)), 7)
    assert Request.from_line(binary.to_line()) == binary
    assert json.loads(binary.to_line())["num_tokens"] == 7
    assert loopback("http://localhost:8000") == ("127.0.0.1", 8000)
    assert loopback("http://[::1]:8000/") == ("::1", 8000)
