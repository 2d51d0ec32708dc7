"""What an ingress takes in at most, without a cluster: the real application, called as ASGI."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import gzip
import itertools
import json
import logging
import time
import tracemalloc
import zlib
from typing import Any

import pytest
from applications import application, ask
from fastapi.exceptions import RequestValidationError
from hypothesis import given
from hypothesis import strategies as st

from serve.config import LIMITS
from serve.http.faults import Faults
from serve.http.limits import Limits
from serve.http.requests import load

# Text that looks like structure, and escapes that could hide where a string ends.
awkward = st.text(st.sampled_from('[]{}"\\/u0041,: é\ud800'), max_size=12)
json_values = st.recursive(
    st.none() | st.integers() | awkward,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(awkward, inner, max_size=3),
    max_leaves=20,
)


@given(json_values)
def test_json_is_read_even_where_text_is_no_unicode(value: Any) -> None:
    assert load(json.dumps(value).encode()) == value


@given(st.binary(max_size=200) | json_values.map(lambda value: json.dumps(value).encode()[:-1]))
def test_anything_at_all_gets_an_answer(text: bytes) -> None:
    with contextlib.suppress(RequestValidationError):
        load(text)


@pytest.mark.parametrize(
    "text",
    [
        b"[" * 10**6,
        b"[" * 10**6 + b"]" * 10**6,
        b'{"a":' * 10**5,
        b'["\\"[' * 10**5,
        b"[]" * 10**6,
        b'"' * 10**6,
        b'"\\' * 10**6 + b"[" * 100,
        b"[[]" * 10**5,
        b'["\\ud800",' * 10**5,
        b'"' + b"\\ud800" * 10**5,
    ],
    ids=range(10),
)
def test_the_worst_texts_are_refused_in_no_time(text: bytes) -> None:
    """Of this thread alone, since others may be at work in this process, and without collecting
    the garbage of all tests before."""
    gc.disable()
    try:
        started = time.thread_time()
        with pytest.raises(RequestValidationError):
            load(text)
        assert time.thread_time() - started < 1.0
    finally:
        gc.enable()


API = application()
NOT_READ = ("/v1/admin/sleep", "/v1/admin/wake")  # they take no body
POSTS = [r.path for r in API.routes if "POST" in r.methods and r.path not in NOT_READ]
BRACKETS = [("[", "]"), ('{"a":', "}"), ('{"groups":[', "]}")]


@pytest.mark.parametrize("path", POSTS)
def test_a_deep_body_is_refused_by_every_protocol(path: str) -> None:
    path = path.replace("{name}", "reward_model")
    for depth, (left, right), inside in itertools.product(
        (202, 1_000, 100_000), BRACKETS, ("{}", '"\\ud800"')
    ):
        for content in (left * depth + inside + right * depth, left * depth + inside):
            kserves = {"Inference-Header-Content-Length": str(len(content))}
            reply = ask(API, "POST", path, content=content, headers=kserves)
            assert reply.status_code == 422
            error = reply.json()["error"]
            message = error if path.endswith("infer") else error["message"]
            assert "recursion limit exceeded" in message


@pytest.mark.parametrize("encoding", ["deflate", "br", "zstd", "identity, gzip"])
def test_other_compression_than_gzip_is_refused_clearly(encoding: str) -> None:
    reply = ask(
        application(), "POST", "/v1/score", content=b"x", headers={"Content-Encoding": encoding}
    )
    assert reply.status_code == 415
    assert "by gzip only" in reply.json()["error"]["message"]
    assert reply.headers["accept-encoding"] == "gzip"


GOOD = gzip.compress(b"{}")


@pytest.mark.parametrize(
    "content",
    [b"{}", b"", GOOD[:-1], GOOD[:-8] + bytes(8), GOOD + b"x", GOOD * 2],
    ids=["no gzip", "nothing", "cut off", "a wrong checksum", "more after its end", "two of them"],
)
def test_a_body_that_is_no_gzip_is_refused(content: bytes) -> None:
    headers = {"Content-Encoding": "gzip"}
    for path in ("/v1/score", "/v2/models/reward_model/infer"):
        reply = ask(application(), "POST", path, content=content, headers=headers)
        assert reply.status_code == 422
        assert "one whole gzip stream" in reply.text


@given(st.binary(max_size=300), st.integers(1, 400), st.integers(1, 50))
def test_what_a_gzip_body_holds_is_as_long_as_it_may_be(body: bytes, limit: int, size: int) -> None:
    compressed = gzip.compress(body)
    chunks = [compressed[at : at + size] for at in range(0, len(compressed), size)]
    limit = max(limit, len(compressed))
    headers = [(b"content-encoding", b"GZIP")]
    assert_one_body(chunks, limit, body if len(body) <= limit else None, headers)


def test_a_bomb_takes_no_memory_and_leaves_others_their_turns() -> None:
    """0.3 MB that would be 300 MB."""
    limit = 20_000_000
    bomb = _bomb(300)
    num_turns = 0

    async def run() -> None:
        nonlocal num_turns
        headers = [(b"content-encoding", b"gzip")]
        call = Call(application(body_limit_bytes=limit), headers=headers)
        call.body.put_nowait({"type": "http.request", "body": bomb, "more_body": False})
        while not call.done.done():
            await asyncio.sleep(0)
            num_turns += 1
        assert call.status == 413

    tracemalloc.start()
    asyncio.run(run())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * limit
    assert num_turns >= limit >> 20


def _bomb(num_megabytes: int) -> bytes:
    deflate = zlib.compressobj(9, zlib.DEFLATED, 31)
    megabyte = bytes(1_000_000)
    return b"".join([*(deflate.compress(megabyte) for _ in range(num_megabytes)), deflate.flush()])


def test_every_limit_is_listed() -> None:
    listed = application().state.service.config.limits()
    assert set(listed) == set(LIMITS)
    assert {"body_limit_bytes", "max_request_tokens", "request_timeout_s"} <= set(listed)


class Call:
    """One request whose body comes as the test wants it."""

    def __init__(self, api: Any, path: str = "/v1/score", headers: Any = ()) -> None:
        self.sent: list[Any] = []
        self.asked_for_body = asyncio.Event()
        self.body: asyncio.Queue[Any] = asyncio.Queue()
        scope = {"type": "http", "method": "POST", "path": path, "headers": [*headers]}
        scope |= {"query_string": b"", "raw_path": path.encode(), "root_path": "", "scheme": "http"}
        scope |= {"http_version": "1.1", "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2)}
        self.done = asyncio.ensure_future(api(scope, self._receive, self._send))

    async def _receive(self) -> Any:
        self.asked_for_body.set()
        return await self.body.get()

    async def _send(self, message: Any) -> None:
        self.sent.append(message)

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])

    @property
    def headers(self) -> dict[bytes, bytes]:
        return dict(self.sent[0]["headers"])


def test_too_many_requests_at_once_are_refused_before_their_bodies() -> None:
    async def run() -> None:
        api = application(max_concurrent_requests=2)
        under_way = [Call(api) for _ in range(2)]
        for call in under_way:
            await call.asked_for_body.wait()
        refused = Call(api)
        await refused.done
        assert refused.status == 429
        assert refused.headers[b"retry-after"] == b"1"
        assert not refused.asked_for_body.is_set()
        for path in ("/health", "/ready", "/v2/health/live", "/v2/health/ready"):
            probe = Call(api, path)  # of the wrong method, but answered
            await probe.done
            assert probe.status == 405
        for call in under_way:
            call.body.put_nowait({"type": "http.request", "body": b"{", "more_body": False})
            await call.done
            assert call.status == 422
        again = Call(api)
        again.body.put_nowait({"type": "http.request", "body": b"{", "more_body": False})
        await again.done
        assert again.status == 422

    asyncio.run(run())


def test_a_body_that_does_not_come_is_not_waited_for() -> None:
    async def run() -> None:
        call = Call(application(request_timeout_s=0.2))
        call.body.put_nowait({"type": "http.request", "body": b"{", "more_body": True})
        await asyncio.wait_for(call.done, 5)
        assert call.status == 408
        assert json.loads(call.sent[1]["body"])["error"]["retryable"] is True

    asyncio.run(run())


def test_a_refused_caller_sends_no_body() -> None:
    async def run() -> None:
        api = application()
        page = [(b"host", b"127.0.0.1"), (b"origin", b"https://evil.example")]
        for headers, status in ((page, 403), ([(b"content-length", b"1" * 12)], 413)):
            call = Call(api, headers=headers)
            await call.done
            assert call.status == status
            assert not call.asked_for_body.is_set()

    asyncio.run(run())


def test_a_client_that_hangs_up_leaves_no_error() -> None:
    async def run() -> None:
        call = Call(application())
        call.body.put_nowait({"type": "http.request", "body": b"{", "more_body": True})
        call.body.put_nowait({"type": "http.disconnect"})
        await asyncio.wait_for(call.done, 5)

    asyncio.run(run())


@given(st.lists(st.binary(max_size=40), min_size=1, max_size=8), st.integers(1, 200))
def test_chunks_become_one_body_within_the_limit(chunks: list[bytes], limit: int) -> None:
    whole = b"".join(chunks)
    assert_one_body(chunks, limit, whole if len(whole) <= limit else None)


def assert_one_body(
    chunks: list[bytes], limit: int, expected: bytes | None, headers: Any = ()
) -> None:
    """None: it is refused as too large."""
    seen: list[bytes] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        message = await receive()
        assert message["more_body"] is False
        seen.append(message["body"])

    async def run() -> None:
        config = application(body_limit_bytes=limit).state.service.config
        call = Call(Limits(app, config), headers=headers)
        for index, chunk in enumerate(chunks):
            more = index + 1 < len(chunks)
            call.body.put_nowait({"type": "http.request", "body": chunk, "more_body": more})
        if expected is None:
            with pytest.raises(Exception, match="body_limit_bytes"):
                await call.done
        else:
            await call.done
            assert seen == [expected]

    asyncio.run(run())


def test_an_unexpected_exception_is_logged_without_what_it_says(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def broken(scope: Any, receive: Any, send: Any) -> None:
        try:
            raise KeyError("canary-1")
        except KeyError as error:
            raise ValueError("canary-2") from error

    async def run() -> Call:
        call = Call(Faults(broken))
        await call.done
        return call

    logging.getLogger("ray.serve").propagate = True
    with caplog.at_level(logging.ERROR, "ray.serve"):
        call = asyncio.run(run())
    assert call.status == 500
    assert json.loads(call.sent[1]["body"])["error"]["type"] == "internal"
    assert "ValueError" in caplog.text
    assert "KeyError" in caplog.text
    assert "in broken" in caplog.text
    assert "canary" not in caplog.text + str(call.sent)
