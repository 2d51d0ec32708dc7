"""What the drop-in protocols have in common, and the small ones: OpenRLHF, LLaMA-Factory, slime.

The bodies are those that the clients' own code builds.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from fastapi.exceptions import RequestValidationError
from hypothesis import given, settings
from hypothesis import strategies as st
from offline import reward, templated

from reward_actor import RewardScorer
from serve.http.requests import check
from serve.protocols.drop_in import ERROR_REWARDS_HEADER, VERSION_HEADER
from serve.protocols.kserve import InferRequest
from serve.protocols.llama_factory import LlamaFactoryRequest
from serve.protocols.openrlhf import OpenRlhfRequest
from serve.protocols.sglang import SglangClassifyRequest, SglangScoreRequest
from serve.protocols.slime import SlimeRequest
from serve.protocols.tei import TeiRequest

if TYPE_CHECKING:
    import httpx

TOO_LONG = "word " * 400


def close(values: Any) -> Any:
    return pytest.approx(values, abs=1e-5)


# ---- OpenRLHF


def openrlhf(texts: list[str]) -> dict[str, Any]:
    """As `remote_rm_ref` of OpenRLHF posts it."""
    return {
        "query": texts,
        "prompts": [text[: text.rfind("<|im_start|>")] for text in texts],
        "labels": [None] * len(texts),
    }


def test_openrlhf(http: httpx.Client, offline: RewardScorer) -> None:
    pairs = [("Name two fruits.", "An apple and a pear."), ("Hi.", "Hello."), ("Hi.", "")]
    # Decoded rollouts end with the end token, not with what a template writes after it.
    texts = [templated(offline, *pair).rstrip("\n") for pair in pairs]
    expected = [reward(offline, *pair) for pair in pairs]
    reply = http.post("/get_reward", json=openrlhf(texts))
    assert reply.status_code == 200
    assert reply.headers[VERSION_HEADER] == offline.model_version
    body = reply.json()
    assert body == {
        "rewards": close(expected),
        "scores": close(expected),
        "extra_logs": {
            "num_tokens": [len(offline.renderer.tokenizer(text)["input_ids"]) for text in texts]
        },
    }
    older = http.post("/get_reward", json={"query": texts}).json()
    assert older == {**body, "rewards": close(expected), "scores": close(expected)}
    by_ids = offline.score_ids([offline.renderer.tokenizer(text)["input_ids"] for text in texts])
    assert body["rewards"] == close(by_ids.tolist())


def test_openrlhf_sends_empty_lists(http: httpx.Client) -> None:
    for body in ({"query": []}, {"query": [], "prompts": [], "labels": []}):
        reply = http.post("/get_reward", json=body)
        assert reply.status_code == 200
        assert reply.json() == {"rewards": [], "scores": [], "extra_logs": {"num_tokens": []}}


def test_openrlhf_text_that_is_cut_off_is_scored_where_it_ends(
    http: httpx.Client, offline: RewardScorer
) -> None:
    text = "<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\nHello, how"
    reply = http.post("/get_reward", json=openrlhf([text]))
    expected = offline.score_ids([offline.renderer.tokenizer(text)["input_ids"]])
    assert reply.json()["rewards"] == close(expected.tolist())


# ---- LLaMA-Factory


def test_llama_factory(http: httpx.Client, offline: RewardScorer) -> None:
    texts = [templated(offline, "Hi.", completion) for completion in ("Hello.", "What?")]
    body = {"model": "model", "messages": texts}
    reply = http.post("/v1/score/evaluation", json=body).json()
    assert reply["scores"] == close([reward(offline, "Hi.", c) for c in ("Hello.", "What?")])
    assert reply["object"] == "score.evaluation"
    assert reply["id"].startswith("scoreeval-")
    assert set(reply) == {"id", "object", "model", "scores"}


def test_llama_factory_cuts_only_when_asked(http: httpx.Client, offline: RewardScorer) -> None:
    body: dict[str, Any] = {"model": "model", "messages": ["fine", TOO_LONG]}
    refused = http.post("/v1/score/evaluation", json=body)
    assert refused.status_code == 422
    assert refused.json()["error"]["index"] == 1
    assert "too_long" in refused.json()["error"]["message"]
    cut = http.post("/v1/score/evaluation", json=body | {"max_length": 16}).json()
    ids = [offline.renderer.tokenizer(text)["input_ids"][:16] for text in body["messages"]]
    assert cut["scores"] == close(offline.score_ids(ids).tolist())
    assert http.post("/v1/score/evaluation", json={"messages": []}).status_code == 422


# ---- slime


def test_slime(http: httpx.Client, offline: RewardScorer) -> None:
    expected = reward(offline, "Hi.", "Hello.")
    messages = [{"role": "user", "content": "Hi."}]
    templated_prompt = "<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\n"
    for prompt in ("Hi.", messages, templated_prompt):
        for response in ("Hello.<|im_end|>", "Hello."):
            if prompt == templated_prompt and response == "Hello.":
                continue  # a rollout without its end
            body = {"prompt": prompt, "response": response, "label": {"answer": 42}}
            reply = http.post("/reward/slime", json=body)
            assert reply.status_code == 200
            assert reply.json() == close(expected)
    refused = http.post("/reward/slime", json={"prompt": "Hi.", "response": TOO_LONG, "label": ""})
    assert refused.status_code == 422
    assert refused.json()["error"]["index"] == 0


# ---- all of them

PATHS = {
    "/v1/score": {"query": [5, 6], "items": [[7]]},
    "/classify": {"input": [5, 6, 7]},
    "/pooling": {"input": [5, 6, 7]},
    "/v1/embeddings": {"input": [5, 6, 7]},
    "/get_reward": {"query": ["fine"]},
    "/predict": {"inputs": "fine"},
    "/v1/score/evaluation": {"messages": ["fine"]},
    "/reward/slime": {"prompt": "Hi.", "response": "Hello."},
    "/v2/models/reward_model/infer": {
        "inputs": [{"name": "sentences", "datatype": "BYTES", "shape": [1], "data": ["fine"]}]
    },
}


@pytest.mark.parametrize("path", PATHS)
def test_unknown_fields_and_any_content_type_are_accepted(http: httpx.Client, path: str) -> None:
    plain = http.post(path, json=PATHS[path])
    assert plain.status_code == 200
    odd = http.post(
        path,
        content=json.dumps({**PATHS[path], "colour": {"a": [1]}, "user": None}),
        headers={"Content-Type": "text/plain"},
    )
    assert odd.status_code == 200
    assert odd.headers[VERSION_HEADER] == plain.headers[VERSION_HEADER]


@pytest.mark.parametrize(
    ("request_of", "body"),
    [
        (OpenRlhfRequest, PATHS["/get_reward"]),
        (TeiRequest, PATHS["/predict"]),
        (LlamaFactoryRequest, PATHS["/v1/score/evaluation"]),
        (SlimeRequest, PATHS["/reward/slime"]),
        (SglangScoreRequest, PATHS["/v1/score"]),
        (SglangClassifyRequest, {"text": "fine"}),
        (InferRequest, PATHS["/v2/models/reward_model/infer"]),
    ],
)
def test_what_a_protocol_cannot_tell_a_template_is_refused(request_of: Any, body: Any) -> None:
    for name, value in {"tools": [{"name": "f"}], "chat_template_kwargs": {"a": 1}}.items():
        check(request_of, {**body, name: None})
        check(request_of, {**body, name: type(value)()})
        with pytest.raises(RequestValidationError, match=f"{name} has no place in this protocol"):
            check(request_of, {**body, name: value})


@pytest.mark.parametrize("path", PATHS)
def test_what_is_not_a_request_is_refused(http: httpx.Client, path: str) -> None:
    for content in ("", "{", "[]", "{}", "null", "7", '{"query": 7}', "[" * 9999):
        reply = http.post(path, content=content, headers={"Content-Type": "application/json"})
        assert reply.status_code == 422, content
        assert reply.json()["error"]


@pytest.mark.parametrize("path", ["/v1/score", "/classify"])
def test_a_path_of_two_protocols_takes_one_of_them(http: httpx.Client, path: str) -> None:
    bodies: dict[str, list[dict[str, Any]]] = {
        "/v1/score": [
            {"groups": [{"prompt_ids": [1], "completion_ids": [[2]]}]},
            {"query": [5], "items": [[6]]},
        ],
        "/classify": [{"input": [5, 6]}, {"text": ["Hi."]}],
    }
    one, other = bodies[path]
    assert http.post(path, json=one).status_code == 200
    assert http.post(path, json=other).status_code == 200
    if path == "/classify":
        both = http.post(path, json={**other, "input_ids": [5]})
        assert "text and input_ids" in both.json()["error"]["message"]
    for body in ({**one, **other}, {}, {"model": "reward-model"}):
        refused = http.post(path, json=body)
        assert refused.status_code == 422
        assert "exactly one protocol" in refused.json()["error"]["message"]


def test_one_bad_sample_fails_its_request_and_is_named(http: httpx.Client) -> None:
    texts = ["fine", "fine", TOO_LONG]
    surrogate = json.dumps({"query": ["fine", "\ud800"]})
    cases: list[tuple[str, Any, int, str]] = [
        ("/get_reward", {"query": texts}, 2, "too_long"),
        ("/get_reward", {"query": ["fine", ""]}, 1, "empty_sequence"),
        ("/get_reward", surrogate, 1, "unrenderable"),
        ("/get_reward", {"query": ["fine", 7]}, 1, "query.1"),
        ("/classify", {"input": texts}, 2, "too_long"),
        ("/classify", {"input": [[5], [6, 9999]]}, 1, "token_out_of_vocabulary"),
        ("/classify", {"input": [[5], [6, -1]]}, 1, "greater than"),
        ("/pooling", {"input": texts, "task": "token_classify"}, 2, "too_long"),
        ("/v1/embeddings", {"input": texts}, 2, "too_long"),
        ("/classify", {"text": texts}, 2, "too_long"),
        ("/classify", {"input": ["fine", 7]}, 1, "input.1"),
        ("/classify", {"text": ["fine", 7]}, 1, "text.1"),
        ("/predict", {"inputs": [["fine"], [7]]}, 1, "inputs.1.0"),
        ("/v1/score", {"query": "a", "items": texts}, 2, "too_long"),
        ("/predict", {"inputs": [["fine"], ["Hi.", TOO_LONG]]}, 1, "too_long"),
        ("/v1/score/evaluation", {"messages": texts}, 2, "too_long"),
    ]
    for path, body, index, word in cases:
        content = body if isinstance(body, str) else json.dumps(body)
        reply = http.post(path, content=content)
        assert reply.status_code == 422, path
        error = reply.json()["error"]
        assert (error["index"], error["retryable"]) == (index, False), path
        assert word in error["message"]
        assert "word word" not in reply.text


def test_no_reply_without_an_error_says_that_it_has_any(http: httpx.Client) -> None:
    for path, body in PATHS.items():
        assert ERROR_REWARDS_HEADER not in http.post(path, json=body).headers
    assert http.get("/info").json()["error_reward"] == "refuse"


def test_every_route_is_described_with_examples_that_work(http: httpx.Client) -> None:
    document = http.get("/openapi.json").json()
    tried = 0
    for path, methods in document["paths"].items():
        if "post" not in methods:
            continue
        if path in ("/v1/admin/sleep", "/v1/admin/wake"):  # nothing to send
            assert "requestBody" not in methods["post"]
            continue
        content = methods["post"]["requestBody"]["content"]
        examples = content["application/json"]["examples"]
        assert examples, path
        if "/admin/" in path:
            continue
        for example in examples.values():
            reply = http.post(path.replace("{name}", "reward_model"), json=example["value"])
            assert reply.status_code == 200, (path, reply.text)
            tried += 1
    assert tried >= 15
    score = document["paths"]["/v1/score"]["post"]["requestBody"]["content"]
    assert "RWQ1" in score["application/vnd.rayward.ids"]["schema"]["description"]
    text = json.dumps(document)
    names = {ref.split('"')[0] for ref in text.split('"#/components/schemas/')[1:]}
    assert names <= set(document["components"]["schemas"]), "every reference leads somewhere"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)
KEYS = (
    "query items text input messages inputs prompt response groups task truncate_prompt_tokens "
    "item_first model max_length parameters"
)
keys = st.sampled_from(KEYS.split())


@settings(max_examples=150)
@given(st.sampled_from(sorted(PATHS)), st.dictionaries(keys, json_values, max_size=3))
def test_no_body_breaks_a_route(http: httpx.Client, path: str, body: dict[str, Any]) -> None:
    for value in (body, {**PATHS[path], **body}):
        reply = http.post(path, content=json.dumps(value))
        assert reply.status_code in (200, 404, 422), (path, value)
