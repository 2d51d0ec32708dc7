"""Routes of other systems that are not here: what a request to them is told."""

from __future__ import annotations

from pathlib import Path

import pytest
from applications import application, ask

from serve.protocols.absent import ABSENT

API = application()
DOCUMENT = Path(__file__).parents[2] / "docs" / "protocols.md"
ENDS = [(end, reason) for ends, reason in ABSENT.items() for end in ends]


@pytest.mark.parametrize(("end", "reason"), ENDS)
def test_an_absent_route_says_why_and_is_documented(end: str, reason: str) -> None:
    assert not [r.path for r in API.routes if r.path == end]
    for path in (end, f"/v2{end}"):
        error = ask(API, "POST", path, json={}).json()["error"]
        assert error["type"] == "not_found"
        assert reason in error["message"]
    assert f"{end}`" in DOCUMENT.read_text().partition("## Absent routes")[2]


def test_an_unknown_path_is_sent_to_the_list_and_not_repeated() -> None:
    reply = ask(API, "GET", "/canary")
    assert reply.status_code == 404
    assert "/docs" in reply.json()["error"]["message"]
    assert "canary" not in reply.text


def test_a_wrong_base_url_is_not_told_that_its_route_is_absent() -> None:
    message = ask(API, "POST", "/v1/v1/score", json={}).json()["error"]["message"]
    assert message == "no such route; /docs lists the routes that there are"
