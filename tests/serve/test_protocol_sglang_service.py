"""SGLang's protocols: /classify with text, /v1/score with query and items."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from offline import reward, templated

if TYPE_CHECKING:
    import httpx

    from reward_actor import RewardScorer

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
    single = http.post("/classify", json={"text": texts[0]}).json()
    assert single["embedding"] == close(items[0]["embedding"])
    ids = [offline.renderer.render("Hi.", completion) for completion in completions]
    by_ids = http.post("/classify", json={"model": "reward-model", "input_ids": ids}).json()
    assert [item["embedding"] for item in by_ids] == [close(item["embedding"]) for item in items]
    single = http.post("/v1/classify", json={"input_ids": ids[1]}).json()
    assert single["embedding"] == close(items[1]["embedding"])


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
