"""No body breaks the service: over all routes of its document no 5xx, no dead replica, no echo."""

from __future__ import annotations

import contextlib
import json
import random
import socket
from collections.abc import Iterator

import httpx
import pytest
import schemathesis
from hostile import (
    CANARY,
    Hostile,
    Route,
    field_by_field,
    framings,
    made_up,
    routes_of,
    whole_bodies,
)
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from processes import titled
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
FUZZING = settings(
    deadline=None,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)


def replicas() -> set[int]:
    """The processes of these tests' own service: ingress and reward models."""
    return {process.pid for process in titled("ray::ServeReplica:rayward:")}


@pytest.fixture(scope="module")
def http(service: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=service, timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def routes(http: httpx.Client) -> list[Route]:
    found = routes_of(http.get("/openapi.json").json())
    assert {"/v1/score", "/v1/admin/models", "/info"} <= {route.path for route in found}
    # That one does what it is asked for, whatever the body; the others would have nothing to say.
    return [route for route in found if route.path != "/v1/admin/sleep"]


@pytest.fixture
def steady(http: httpx.Client) -> Iterator[None]:
    """Afterwards the replicas are those from before, and still score."""
    before = replicas()
    assert len(before) >= 3
    yield
    assert replicas() == before
    groups = [{"prompt_ids": [1], "completion_ids": [[2]]}]
    assert http.post("/v1/score", json={"groups": groups}).status_code == 200


def send(http: httpx.Client, route: Route, hostile: Hostile) -> None:
    headers = hostile.headers | {"X-Test": CANARY}
    reply = http.request(route.method, route.path, content=hostile.content, headers=headers)
    assert reply.status_code < 500, (route, hostile, reply.text)
    if reply.status_code >= 400:
        assert CANARY not in reply.text, (route, hostile, reply.text)
        assert CANARY not in str(reply.headers)
        if reply.headers.get("content-type") == "application/json":
            assert reply.json()["error"], (route, hostile, reply.text)


def corpus(routes: list[Route]) -> list[tuple[Route, Hostile]]:
    return [
        (route, hostile)
        for route in routes
        for hostile in (*whole_bodies(route), *field_by_field(route))
    ]


def test_a_sample_of_the_corpus_breaks_nothing(
    http: httpx.Client, routes: list[Route], steady: None
) -> None:
    sample = random.Random(0)
    for route in routes:  # some of each route's, whatever their number
        for hostile in sample.sample([*whole_bodies(route), *field_by_field(route)], 40):
            send(http, route, hostile)


@pytest.mark.long
def test_the_whole_corpus_breaks_nothing(
    http: httpx.Client, routes: list[Route], steady: None
) -> None:
    cases = corpus(routes)
    for route, hostile in cases:
        send(http, route, hostile)
    print(f"{len(cases)} hostile bodies over {len(routes)} routes")


def fuzz(http: httpx.Client, routes: list[Route], num: int) -> None:
    cases = st.sampled_from(routes).flatmap(lambda r: st.tuples(st.just(r), made_up(r)))

    @settings(FUZZING, max_examples=num)
    @given(cases)
    def run(case: tuple[Route, Hostile]) -> None:
        send(http, *case)

    run()


def test_made_up_bodies_break_nothing(
    http: httpx.Client, routes: list[Route], steady: None
) -> None:
    fuzz(http, routes, 150)


@pytest.mark.long
def test_ten_thousand_made_up_bodies_break_nothing(
    http: httpx.Client, routes: list[Route], steady: None
) -> None:
    fuzz(http, routes, 10_000)


def test_broken_framings_break_nothing(
    http: httpx.Client, routes: list[Route], steady: None
) -> None:
    address = (http.base_url.host, http.base_url.port)
    for request in framings("POST", "/v1/score"):
        with socket.create_connection(address, timeout=60) as connection:
            connection.sendall(request)
            with contextlib.suppress(OSError):  # it has closed the connection already
                connection.shutdown(socket.SHUT_WR)
            reply = b""
            while part := connection.recv(65536):
                reply += part
        if reply:
            assert reply.startswith((b"HTTP/1.1 2", b"HTTP/1.1 4", b"HTTP/1.0 4")), (request, reply)
        assert CANARY.encode() not in reply, (request, reply)


def test_the_corpus_holds_what_it_should(routes: list[Route]) -> None:
    """Every route has hostile bodies of its own, and there are thousands together."""
    cases = corpus(routes)
    assert len(cases) > 2_000
    scoring = [route for route in routes if route.path == "/v1/score"]
    assert {"groups", "prompt_ids", "completions", "content"} <= set(scoring[0].fields)
    json.dumps(scoring[0].example)


def hold_to_its_document(service: str, num: int) -> None:
    """Every operation, with `num` requests as it describes them, and `num` that it does not."""
    document = schemathesis.openapi.from_url(service + "/openapi.json")
    for found in document.get_all_operations():
        operation = found.ok()
        modes = [GenerationMode.POSITIVE]
        if operation.body:
            modes.append(GenerationMode.NEGATIVE)
        for mode in modes:

            @settings(FUZZING, max_examples=num)
            @given(operation.as_strategy(mode))
            def run(case: schemathesis.Case) -> None:
                case.call_and_validate(checks=CHECKS, timeout=120)

            run()


def test_the_service_holds_to_its_document(service: str, steady: None) -> None:
    hold_to_its_document(service, 10)


@pytest.mark.long
def test_the_service_holds_to_its_document_for_long(service: str, steady: None) -> None:
    hold_to_its_document(service, 500)
