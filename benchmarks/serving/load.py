"""A lean HTTP/1.1 load generator, run as a process of its own; its figures are JSON on stdout.

    python -m benchmarks.serving.load http://127.0.0.1:8000 BODIES --connections 64 --duration-s 30
    python -m benchmarks.serving.load http://127.0.0.1:8000 BODIES --rate 2.5 --duration-s 30

BODIES holds one request a line, {"path", "content_type", "body" (base64), "num_tokens"}; they are
sent in order, and from the beginning again when there are no more. Closed loop: every connection
sends the next request when its last one is answered. Open loop (--rate): Poisson arrivals, whoever
is late; a latency counts from the time at which the request was due. Latencies are of what begins
in the window after the warm-up; the load goes on until all that began before its end is answered.
A request counts for throughput by the share of its time that lies within the window. Replies are
not read beyond their status: whoever asks for the load checks them apart from it. Loopback only.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import ipaddress
import json
import math
import random
import sys
import time
from collections import Counter
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast
from urllib.parse import urlsplit

from benchmarks.common.arguments import positive, positive_float, seconds
from benchmarks.serving.http_reply import ReplyParser

# After a connection that was refused or broken off, lest a dead server is asked in a busy loop.
_PAUSE_S = 0.05
_FAILED = 0


@dataclass(frozen=True)
class Request:
    """One request of the load; num_tokens: of all its sequences, unshared."""

    path: str
    content_type: str
    body: bytes
    num_tokens: int

    def to_line(self) -> str:
        text = base64.b64encode(self.body).decode("ascii")
        return json.dumps({**vars(self), "body": text})

    @classmethod
    def from_line(cls, line: str) -> Request:
        row = json.loads(line)
        return cls(**{**row, "body": base64.b64decode(row["body"])})

    def to_http(self, host: str, keep_alive: bool) -> bytes:
        head = (
            f"POST {self.path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: {self.content_type}\r\n"
            f"Content-Length: {len(self.body)}\r\nConnection: "
            f"{'keep-alive' if keep_alive else 'close'}\r\n\r\n"
        )
        return head.encode("ascii") + self.body


@dataclass(frozen=True)
class Plan:
    """How the load is put on. rate: requests a second, open loop; None: closed loop.

    connections: in a closed loop those that ask, in an open one the most at once.
    """

    host: str
    port: int
    connections: int
    new_connections: bool
    rate: float | None
    seed: int
    warm_up_s: float
    duration_s: float
    max_requests: int
    timeout_s: float


class Record(NamedTuple):
    """One answered request, in seconds of one clock; status 0: it failed or timed out."""

    due: float
    done: float
    status: int
    num_tokens: int


class Connection(asyncio.Protocol):
    """One connection with at most one request on its way."""

    def __init__(self) -> None:
        self._parser = ReplyParser()
        self._answer: asyncio.Future[int] | None = None
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(
            "asyncio.Transport", transport
        )  # uvloop's is of no class of asyncio's

    def data_received(self, data: bytes) -> None:
        try:
            self._settle(self._parser.feed(data))
        except ValueError:  # what else comes cannot be told apart any more
            self.close()

    def connection_lost(self, _: Exception | None) -> None:
        self.transport = None
        self._settle(self._parser.end())
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(ConnectionResetError())

    async def ask(self, payload: bytes) -> int:
        """The status of the reply. Raises OSError where the connection breaks."""
        if self.transport is None:
            raise ConnectionResetError
        self._answer = asyncio.get_running_loop().create_future()
        self.transport.write(payload)
        return await self._answer

    @property
    def is_usable(self) -> bool:
        return self.transport is not None and self._parser.keeps_alive

    def close(self) -> None:
        if self.transport is not None:
            self.transport.abort()

    def _settle(self, status: int | None) -> None:
        if status is not None and self._answer is not None and not self._answer.done():
            self._answer.set_result(status)


class Load:
    """One run of a plan over requests. `records` grows with every answer."""

    def __init__(self, plan: Plan, requests: Sequence[Request]) -> None:
        self._plan = plan
        host = f"{plan.host}:{plan.port}"
        self._payloads = [r.to_http(host, not plan.new_connections) for r in requests]
        self._num_tokens = [request.num_tokens for request in requests]
        self._slots = asyncio.Semaphore(plan.connections)
        self._idle: list[Connection] = []
        self._num_counted = 0  # on their way now, begun before the window's end
        self.num_sent = 0
        self.records: list[Record] = []
        self.begin = self.end = 0.0

    async def run(self) -> None:
        """Returns when all that began before the window's end is answered or timed out."""
        plan = self._plan
        self.begin = time.monotonic() + plan.warm_up_s
        self.end = self.begin + plan.duration_s
        if plan.rate is None:
            askers = [self._ask_on() for _ in range(plan.connections)]
        else:
            askers = [self._arrivals(plan.rate)]
        tasks = [asyncio.create_task(asker) for asker in askers]
        await asyncio.wait(tasks, timeout=self.end - time.monotonic())
        while self._num_counted:
            await asyncio.sleep(0.01)
        for task in tasks:
            task.cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(result, Exception):
                raise result
        for connection in self._idle:
            connection.close()
        if self.num_sent >= plan.max_requests:  # they ran out before the time did
            self.end = min(self.end, max(record.due for record in self.records))

    async def _ask_on(self) -> None:
        while self.num_sent < self._plan.max_requests:
            if await self._one(time.monotonic()) == _FAILED:
                await asyncio.sleep(_PAUSE_S)

    async def _arrivals(self, rate: float) -> None:
        source = random.Random(self._plan.seed)
        due = time.monotonic()
        async with asyncio.TaskGroup() as arrived:
            while self.num_sent < self._plan.max_requests:
                due += source.expovariate(rate)
                await asyncio.sleep(due - time.monotonic())
                arrived.create_task(self._one(due))
                # It counts itself as sent when it runs, before this goes on.
                await asyncio.sleep(0)

    async def _one(self, due: float) -> int:
        index = self.num_sent % len(self._payloads)
        self.num_sent += 1
        is_counted = due < self.end
        self._num_counted += is_counted
        try:
            async with self._slots:
                status = await self._answer(self._payloads[index])
            record = Record(due, time.monotonic(), status, self._num_tokens[index])
            self.records.append(record)
        finally:
            self._num_counted -= is_counted
        return status

    async def _answer(self, payload: bytes) -> int:
        """The status, or 0 where there was none in time."""
        connection = None
        status = _FAILED
        try:
            async with asyncio.timeout(self._plan.timeout_s):
                connection = await self._connection()
                status = await connection.ask(payload)
        except (OSError, TimeoutError, ValueError):
            return _FAILED
        finally:
            keeps = status != _FAILED and not self._plan.new_connections
            if connection is not None and keeps and connection.is_usable:
                self._idle.append(connection)
            elif connection is not None:
                connection.close()
        return status

    async def _connection(self) -> Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_usable:  # a server may have closed it meanwhile
                return connection
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(Connection, self._plan.host, self._plan.port)
        return connection


def percentile(ordered: Sequence[float], share: float) -> float:
    """The least value that at least this share of the values, in ascending order, do not exceed."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def summarize(records: Sequence[Record], begin: float, end: float) -> dict[str, Any]:
    """The figures of a window (seconds). Raises ValueError if nothing was answered in it.

    Latencies are of what was due within the window and answered with 200; requests_per_s and
    tokens_per_s of what was answered with 200, by the share of its time that lies within the
    window, which rounds nothing off at the window's ends.
    """
    due = [record for record in records if begin <= record.due < end]
    statuses = Counter(str(r.status) if r.status else "failed" for r in due)
    latencies = sorted(1e3 * (r.done - r.due) for r in due if r.status == 200)
    if not due:
        raise ValueError(
            f"no request began within the {end - begin:g} s of the window: it is shorter than one "
            "takes; give a longer --duration-s"
        )
    if not latencies:
        raise ValueError(f"nothing was answered with 200 within the window; {dict(statuses)}")
    num_requests = num_tokens = 0.0
    for record in records:
        within = min(record.done, end) - max(record.due, begin)
        if record.status == 200 and within > 0:
            share = within / (record.done - record.due)
            num_requests += share
            num_tokens += share * record.num_tokens
    return {
        "window_s": end - begin,
        "num_requests": len(due),
        "statuses": dict(statuses),
        "requests_per_s": num_requests / (end - begin),
        "tokens_per_s": num_tokens / (end - begin),
        "mean_ms": sum(latencies) / len(latencies),
        "p50_ms": percentile(latencies, 0.50),
        "p90_ms": percentile(latencies, 0.90),
        "p99_ms": percentile(latencies, 0.99),
        "max_ms": latencies[-1],
    }


async def put_on(plan: Plan, requests: Sequence[Request]) -> dict[str, Any]:
    """Run the plan; the figures of its window. Raises ValueError if nothing was answered."""
    load = Load(plan, requests)
    cpu_s, started = time.process_time(), time.monotonic()
    await load.run()
    cpu_share = (time.process_time() - cpu_s) / (time.monotonic() - started)
    figures = summarize(load.records, load.begin, load.end)
    repeated = max(0, load.num_sent - len(requests))
    return {**figures, "num_repeated": repeated, "generator_cpu_share": cpu_share}


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when something was answered, 1 when nothing was, 2 for bad flags."""
    parser = make_parser()
    args = parser.parse_args(arguments)
    try:
        host, port = loopback(args.url)
        lines = args.requests.read_text(encoding="ascii").splitlines()
        requests = [Request.from_line(line) for line in lines]
        if not requests:
            raise ValueError(f"{args.requests} holds no requests")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    settings = {k: v for k, v in vars(args).items() if k not in ("url", "requests")}
    plan = Plan(host, port, **settings)
    try:
        figures = _run(put_on(plan, requests))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    print(json.dumps(figures))
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("url", help="http://HOST:PORT of a server on this machine")
    add("requests", type=Path, metavar="BODIES", help="file of requests, one JSON object a line")
    add("--connections", type=positive, default=1, help="of a closed loop; most of an open one")
    add("--new-connections", action="store_true", help="a new connection for each request")
    add("--rate", type=positive_float, help="arrivals a second, open loop; default: closed loop")
    add("--seed", type=int, default=0, help="of the arrivals")
    add("--warm-up-s", type=seconds, default=2.0, help="load before the window")
    add("--duration-s", type=positive_float, default=10.0, help="the window that is measured")
    add("--max-requests", type=positive, default=1_000_000)
    add("--timeout-s", type=positive_float, default=120.0, help="of one request")
    return parser


def loopback(url: str) -> tuple[str, int]:
    """Address and port. Raises ValueError for anything but http on this machine's loopback."""
    parts = urlsplit(url)
    host = "127.0.0.1" if parts.hostname == "localhost" else parts.hostname or ""
    if parts.scheme != "http" or parts.port is None or parts.path not in ("", "/"):
        raise ValueError(f"{url} is not http://HOST:PORT")
    try:
        is_loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_loopback = False
    if not is_loopback:
        raise ValueError(f"{host} is not a loopback address; load is for this machine alone")
    return host, parts.port


def _run(work: Coroutine[Any, Any, dict[str, Any]]) -> dict[str, Any]:
    try:
        import uvloop
    except ImportError:
        return asyncio.run(work)
    figures: dict[str, Any] = uvloop.run(work)
    return figures


if __name__ == "__main__":
    sys.exit(main())
