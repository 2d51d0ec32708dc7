"""SGLang's /v1/score: how query and items are put together, and how much of them is taken."""

from __future__ import annotations

from typing import Any

import pytest
from applications import application, ask
from hypothesis import given
from hypothesis import strategies as st

from reward_actor.groups import Whole
from serve.config import ServeConfig
from serve.protocols import sglang
from serve.protocols.sglang import SglangScoreRequest, check_size, to_whole


@given(st.text(max_size=5), st.lists(st.text(max_size=5), min_size=1, max_size=3), st.booleans())
def test_texts_are_put_together_as_they_are(query: str, items: list[str], first: bool) -> None:
    request = SglangScoreRequest(query=query, items=items, item_first=first)
    joined = [item + query if first else query + item for item in items]
    assert to_whole(request) == Whole(joined, add_special_tokens=True)
    [only] = to_whole(SglangScoreRequest(query=query, items=items[0])).texts
    assert only == query + items[0]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"query": "", "items": [""] * 4}, "4 items in one request; max_request_samples is 3"),
        ({"query": [1], "items": [[]] * 4}, "4 items in one request; max_request_samples is 3"),
        ({"query": "x" * 149, "items": ["y", "z", ""]}, "449 characters in one request"),
        ({"query": "x" * 448, "items": "y"}, "449 characters in one request"),
        ({"query": [1] * 3, "items": [[1], [2]]}, "8 tokens in one request"),
        ({"query": [1] * 3, "items": [[1], [2]], "item_first": True}, "8 tokens in one request"),
    ],
)
def test_what_is_too_much_is_refused_before_it_is_put_together(
    body: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[SglangScoreRequest] = []
    monkeypatch.setattr(sglang, "to_whole", built.append)
    api = application(max_request_samples=3, max_request_tokens=7)
    reply = ask(api, "POST", "/v1/score", json=body)
    assert reply.status_code == 413
    assert reply.json()["error"]["type"] == "too_many_tokens"
    assert message in reply.json()["error"]["message"]
    assert reply.json()["error"]["retryable"] is False
    assert not built


def test_as_much_as_fits_is_put_together() -> None:
    config = ServeConfig(model="m", max_request_samples=3, max_request_tokens=7)
    for body in (
        {"query": "x" * 149, "items": ["y", "", ""]},  # 448 characters: 64 for each token
        {"query": "x" * 447, "items": "y"},
        {"query": [1, 2], "items": [[3], [], []]},
    ):
        check_size(SglangScoreRequest.model_validate(body), config)
