"""text-embeddings-inference's POST /predict."""

from __future__ import annotations

import gzip
import json
import math
from typing import TYPE_CHECKING, Any

import pytest
from offline import reward, templated

from reward_actor.groups import Group, Whole
from serve.protocols.tei import TeiRequest, to_groups

if TYPE_CHECKING:
    import httpx

    from reward_actor import RewardScorer

TOO_LONG = "word " * 400


def close(values: Any) -> Any:
    return pytest.approx(values, abs=1e-5)


def test_pairs_texts_and_batches_of_both(http: httpx.Client, offline: RewardScorer) -> None:
    pair = ["Name two fruits.", "An apple and a pear."]
    text = templated(offline, "Hi.", "Hello.")
    expected = [reward(offline, *pair), reward(offline, "Hi.", "Hello.")]
    inputs: list[tuple[Any, Any]] = [
        (pair, expected[0]),
        (text, expected[1]),
        ([text], expected[1]),
        ([pair, [text]], expected),
        ([[text]], expected[1:]),
    ]
    for asked, rewards in inputs:
        body = {"inputs": asked, "raw_scores": True, "truncate": False}
        reply = http.post("/predict", json=body).json()
        if isinstance(rewards, float):
            assert reply == [{"score": close(rewards), "label": "reward"}]
        else:
            assert reply == [[{"score": close(r), "label": "reward"}] for r in rewards]


def test_scores_pass_a_sigmoid_unless_raw(http: httpx.Client, offline: RewardScorer) -> None:
    expected = reward(offline, "Hi.", "Hello.")
    [found] = http.post("/predict", json={"inputs": ["Hi.", "Hello."]}).json()
    assert found["score"] == close(1 / (1 + math.exp(-expected)))


def test_the_hubs_client_asks_at_the_base_url(
    http: httpx.Client, offline: RewardScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import InferenceClient, constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # else it asks nobody
    client = InferenceClient(str(http.base_url), token="unused")
    text = templated(offline, "Hi.", "Hello.")
    expected = reward(offline, "Hi.", "Hello.")
    [raw] = client.text_classification(text, function_to_apply="none")
    assert (raw.label, raw.score) == ("reward", close(expected))
    for options in ({}, {"function_to_apply": "sigmoid", "top_k": 1}):
        [found] = client.text_classification(text, **options)
        assert found.score == close(1 / (1 + math.exp(-expected)))
    assert http.post("/", json={"inputs": text, "raw_scores": True}).json() == [
        {"score": close(expected), "label": "reward"}
    ]
    refused = http.post("/", json={"inputs": text, "parameters": {"function_to_apply": "softmax"}})
    assert refused.status_code == 422
    assert "function_to_apply" in refused.json()["error"]["message"]


def test_bodies_may_be_compressed(http: httpx.Client) -> None:
    """Through whatever stands between a client and the service."""
    body = json.dumps({"inputs": ["Hi.", "Hello."]}).encode()
    headers = {"Content-Encoding": "gzip", "Content-Type": "application/json"}
    compressed = http.post("/predict", content=gzip.compress(body), headers=headers)
    assert compressed.json() == http.post("/predict", content=body).json()


@pytest.mark.parametrize("direction", ["right", "Right", "left", "Left"])
def test_texts_are_cut_when_asked(
    http: httpx.Client, offline: RewardScorer, direction: str
) -> None:
    text = " ".join(map(str, range(400)))
    body: dict[str, Any] = {"inputs": text, "raw_scores": True}
    refused = http.post("/predict", json=body)
    assert refused.status_code == 422
    assert "too_long" in refused.json()["error"]["message"]
    body |= {"truncate": True, "truncation_direction": direction}
    ids = offline.renderer.tokenizer(text)["input_ids"]
    limit = offline.contract.max_length
    kept = ids[:limit] if direction.lower() == "right" else ids[-limit:]
    [found] = http.post("/predict", json=body).json()
    assert found["score"] == close(float(offline.score_ids([kept])[0]))


def test_a_pair_is_never_cut(http: httpx.Client) -> None:
    refused = http.post("/predict", json={"inputs": [["Hi.", TOO_LONG]], "truncate": True})
    assert refused.status_code == 422
    assert refused.json()["error"]["index"] == 0


@pytest.mark.parametrize("inputs", [[], [[]], ["a", "b", "c"], [["a", "b", "c"]], [["a"], "b"], 7])
def test_what_is_neither_a_text_nor_a_pair_is_refused(http: httpx.Client, inputs: Any) -> None:
    reply = http.post("/predict", json={"inputs": inputs})
    assert reply.status_code == 422
    assert "inputs" in reply.json()["error"]["message"]


def test_a_single_text_gets_the_tokenizers_special_tokens() -> None:
    groups = to_groups(TeiRequest(inputs=[["a"], ["b", "c"]], truncate=True))
    whole = Whole(["a"], add_special_tokens=True, max_tokens="model", keep="left")
    assert groups == [whole, Group("b", ["c"])]
