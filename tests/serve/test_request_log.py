"""Request ids and lines: every way that a request may end, and nothing of what it said."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.responses import PlainTextResponse

from serve.api import build_api
from serve.config import ServeConfig
from serve.ingress.service import RewardService
from serve.ingress.swap import Swapper
from serve.monitoring import request_log
from serve.monitoring.request_log import CURRENT, Answered, LogFile, RequestLog, json_line

CANARY = "canary-in-a-coal-mine"


class Failed(Exception):
    pass


def api(seen: list[Answered]) -> FastAPI:
    app = FastAPI()

    @app.get("/things/{thing}")
    async def things(thing: str) -> str:
        answered = CURRENT.get()
        assert answered is not None
        answered.num_samples, answered.num_tokens = 2, 7
        return thing

    @app.get("/bug")
    async def bug() -> str:
        raise Failed(CANARY)

    @app.get("/slow")
    async def slow() -> None:
        await asyncio.sleep(60)

    @app.get("/full")
    async def full() -> PlainTextResponse:
        return PlainTextResponse("", 413, {"X-Rayward-Error": "too_many_tokens"})

    app.add_middleware(RequestLog, on_answer=seen.append)
    return app


async def get(
    app: FastAPI,
    path: str,
    request_id: bytes | None = None,
    method: str = "GET",
    messages: Sequence[Any] = ({"type": "http.request", "body": b"", "more_body": False},),
) -> list[Any]:
    """The messages that are sent back; the last of those that come in comes again and again."""
    coming = list(messages)
    headers = [] if request_id is None else [(b"x-request-id", request_id)]
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": CANARY.encode(),
        "root_path": "",
        "headers": headers,
        "http_version": "1.1",
        "scheme": "http",
        "server": ("h", 1),
        "client": ("c", 2),
    }
    sent: list[Any] = []

    async def receive() -> Any:
        return coming.pop(0) if len(coming) > 1 else coming[0]

    async def send(message: Any) -> None:
        sent.append(message)

    await app(scope, receive, send)
    return sent


def answered(path: str, request_id: bytes | None = None) -> tuple[Answered, dict[bytes, bytes]]:
    seen: list[Answered] = []
    sent: list[Any] = []
    with contextlib.suppress(Failed):  # Starlette answers and raises it again, to be logged
        sent = asyncio.run(get(api(seen), path, request_id))
    [one] = seen
    return one, dict(sent[0]["headers"]) if sent else {}


def test_a_request_is_told_of_by_its_route_and_not_by_its_path() -> None:
    one, headers = answered(f"/things/{CANARY}")
    assert (one.route, one.status, one.error_type) == ("/things/{thing}", 200, None)
    assert (one.num_samples, one.num_tokens) == (2, 7)
    assert headers[b"x-request-id"].decode() == one.request_id
    assert CANARY not in json_line(one)


@pytest.mark.parametrize(
    ("path", "route", "status", "error_type"),
    [
        (f"/{CANARY}", "other", 404, "not_found"),
        ("/bug", "/bug", 500, "internal"),
        ("/full", "/full", 413, "too_many_tokens"),
    ],
)
def test_what_goes_wrong_is_told_too(path: str, route: str, status: int, error_type: str) -> None:
    one, _ = answered(path)
    assert (one.route, one.status) == (route, status)
    assert one.error_type == error_type
    assert json.loads(json_line(one))["error"] == error_type
    assert CANARY not in json_line(one)


def test_a_client_that_hung_up_is_told_apart() -> None:
    seen: list[Answered] = []

    async def hang_up() -> None:
        request = asyncio.create_task(get(api(seen), "/slow"))
        await asyncio.sleep(0.05)
        request.cancel()
        await asyncio.wait({request})

    asyncio.run(hang_up())
    [one] = seen
    assert (one.route, one.status, one.error_type) == ("/slow", 499, None)


@pytest.mark.parametrize("path", ["/v1/score", "/classify", "/v2/models/reward_model/infer"])
def test_a_client_that_hung_up_within_its_body_is_no_fault_of_ours(
    path: str, tmp_path: Path
) -> None:
    config = ServeConfig(model="nowhere")
    no_handle: Any = None
    file = tmp_path / "requests.jsonl"
    service = RewardService(config, no_handle, "test", "test", file)
    seen: list[Answered] = []
    tell = service.observer.answered

    def answered(one: Answered) -> None:
        seen.append(one)
        tell(one)

    service.observer.answered = answered  # type: ignore[method-assign]
    app = build_api(service, Swapper(service.replicas, "rayward", config))
    messages = [
        {"type": "http.request", "body": CANARY.encode(), "more_body": True},
        {"type": "http.disconnect"},
    ]
    sent = asyncio.run(get(app, path, method="POST", messages=messages))
    [one] = seen
    route = path.replace("reward_model", "{name}")
    assert (one.route, one.status, one.error_type) == (route, 499, None)
    assert sent == []
    assert not file.exists(), "our own failures are written at once"


@settings(deadline=None)
@given(st.text("abcXYZ019-_", min_size=1, max_size=64))
def test_a_sane_id_is_kept_and_left_to_the_server_to_send_back(request_id: str) -> None:
    one, headers = answered("/things/a", request_id.encode())
    assert one.request_id == request_id
    assert b"x-request-id" not in headers


@settings(deadline=None)
@given(st.binary(max_size=80))
def test_any_other_is_replaced(request_id: bytes) -> None:
    one, headers = answered("/things/a", request_id)
    is_sane = re.fullmatch(rb"[A-Za-z0-9_-]{1,64}", request_id) is not None
    assert (one.request_id.encode() == request_id) == is_sane
    assert re.fullmatch(r"[A-Za-z0-9_-]{1,64}", one.request_id)
    assert is_sane or headers[b"x-request-id"].decode() == one.request_id


def test_a_file_holds_our_own_failures_or_everything(tmp_path: Path) -> None:
    for every_request, expected in ((True, [200, 429, 503]), (False, [503])):
        file = tmp_path / f"{every_request}.jsonl"
        log = LogFile(file, every_request=every_request)
        for status in (200, 429, 503):
            log.add(Answered("an-id", "/v1/score", status))
            assert file.exists() == (status == 503), "our own failures are written at once"
        log.flush()
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        assert [line["status"] for line in lines] == expected
        assert {line["request_id"] for line in lines} == {"an-id"}


def test_a_file_that_is_full_is_begun_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_log, "_MAX_FILE_BYTES", 1000)
    log = LogFile(tmp_path / "requests.jsonl", every_request=True)
    for number in range(30):
        log.add(Answered(f"id-{number}", "/v1/score", 200))
        log.flush()
    old, new = (tmp_path / "requests.old.jsonl").read_text(), tmp_path / "requests.jsonl"
    assert 1000 < len(old) < 1300
    assert '"id-29"' in (new.read_text() if new.exists() else old)
