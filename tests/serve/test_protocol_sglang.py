"""SGLang's protocols: /classify with text, /v1/score with query and items."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from applications import application, ask
from hypothesis import given
from hypothesis import strategies as st
from offline import reward, templated

from reward_actor import RewardScorer
from reward_actor.groups import Whole
from serve.config import ServeConfig
from serve.protocols import sglang
from serve.protocols.sglang import SglangScoreRequest, check_size, to_whole

if TYPE_CHECKING:
    import httpx

PROMPT = "<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\n"


def close(values: Any) -> Any:
    return pytest.approx(values, abs=1e-5)


def test_classify(http: httpx.Client, offline: RewardScorer) -> None:
    completions = ["Hello.", "What?"]
    texts = [templated(offline, "Hi.", completion) for completion in completions]
    body = {"model": "reward-model", "text": texts}
    items = http.post("/classify", json=body).json()
    assert [item["embedding"] for item in items] == [
        [close(reward(offline, "Hi.", completion))] for completion in completions
    ]
    assert items[0]["meta_info"]["prompt_tokens"] == len(offline.renderer.render("Hi.", "Hello."))
    assert items[0]["meta_info"]["weight_version"] == offline.model_version
    [first, single] = [items[0], http.post("/classify", json={"text": texts[0]}).json()]
    assert single["embedding"] == close(first["embedding"])


def test_score_of_texts_and_of_ids(http: httpx.Client, offline: RewardScorer) -> None:
    completions = ["Hello.", "What?"]
    expected = [[close(reward(offline, "Hi.", completion))] for completion in completions]
    items = [completion + "<|im_end|>" for completion in completions]
    reply = http.post("/v1/score", json={"query": PROMPT, "items": items}).json()
    num = sum(len(offline.renderer.render("Hi.", completion)) for completion in completions)
    assert reply == {
        "scores": expected,
        "model": "reward-model",
        "usage": {"prompt_tokens": num, "total_tokens": num, "completion_tokens": 0},
        "object": "scoring",
    }
    ids = {"query": [5, 6], "items": [[7], [8, 9]], "apply_softmax": False, "model": "default"}
    rows = offline.score_ids([[5, 6, 7], [5, 6, 8, 9]]).tolist()
    assert http.post("/v1/score", json=ids).json()["scores"] == [[close(r)] for r in rows]
    turned = http.post("/v1/score", json={**ids, "item_first": True}).json()["scores"]
    rows = offline.score_ids([[7, 5, 6], [8, 9, 5, 6]]).tolist()
    assert turned == [[close(r)] for r in rows]


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/classify", {"text": []}, 422, "at least 1 item"),
        ("/classify", {"text": ["Hi."], "model": "other"}, 404, "'reward-model'"),
        ("/v1/score", {"query": "Hi."}, 422, "items"),
        ("/v1/score", {"query": "Hi.", "items": []}, 422, "at least 1 item"),
        ("/classify", {"text": ["Hi.", 7]}, 422, "text.1: Input should be a valid string"),
        ("/v1/score", {"query": "Hi.", "items": [[5]]}, 422, "both be"),
        ("/v1/score", {"query": [5], "items": ["Hi."]}, 422, "both be"),
        ("/v1/score", {"query": [5], "items": [[6]], "apply_softmax": True}, 422, "1.0"),
        ("/v1/score", {"query": [5], "items": [[6]], "model": "other"}, 404, "'reward-model'"),
    ],
)
def test_what_is_refused(
    http: httpx.Client, path: str, body: Any, status: int, message: str
) -> None:
    reply = http.post(path, json=body)
    assert reply.status_code == status
    assert message in reply.json()["error"]["message"]


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
