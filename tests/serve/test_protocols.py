"""What the drop-in protocols have in common, and the small ones: OpenRLHF, LLaMA-Factory, slime.

The bodies are those that the clients' own code builds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.exceptions import RequestValidationError
from hypothesis import given, settings
from hypothesis import strategies as st
from offline import reward, templated

from reward_actor import Group, RewardClient, RewardScorer
from reward_actor.config_errors import validate
from serve.config import ServeConfig
from serve.http.requests import check
from serve.protocols.drop_in import ERROR_REWARDS_HEADER, VERSION_HEADER, sigmoid
from serve.protocols.kserve import InferRequest
from serve.protocols.llama_factory import LlamaFactoryRequest
from serve.protocols.openrlhf import OpenRlhfRequest
from serve.protocols.sglang import SglangClassifyRequest, SglangScoreRequest
from serve.protocols.slime import SlimeRequest
from serve.protocols.tei import TeiRequest

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


@given(st.floats(-1e300, 1e300))
def test_the_sigmoid_takes_any_number(value: float) -> None:
    assert 0.0 <= sigmoid(value) <= 1.0
    assert sigmoid(value) + sigmoid(-value) == pytest.approx(1.0)


def application(service: str, name: str, config: ServeConfig) -> Iterator[str]:
    """The URL of a second application of the shared service's cluster."""
    from ray import serve

    from serve.app import build, resolve

    config = config.model_copy(
        update={"device": "cpu", "cpus_per_replica": 0.5, "threads_per_replica": 1}
    )
    serve.run(build(resolve(config), use_gpu=False), name=name, route_prefix=f"/{name}")
    yield f"{service}/{name}"
    serve.delete(name)


ERROR_REWARD = -10.0


FUNCTIONS = """
def brevity(prompt, completions):
    return [-len(completion) for completion in completions]

REWARDS = {"brevity": brevity}
"""


@pytest.fixture(scope="module")
def lenient(
    service: str, export_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[httpx.Client]:
    """A service that answers a number for what cannot be scored, and reports a function's rewards
    as well."""
    functions = tmp_path_factory.mktemp("functions") / "rewards.py"
    functions.write_text(FUNCTIONS)
    config = ServeConfig(model=str(export_dir), error_reward=ERROR_REWARD, functions=str(functions))
    for url in application(service, "lenient", config):
        with httpx.Client(base_url=url, timeout=60) as client:
            yield client


GOOD = "An apple and a pear."


def bad_among_good() -> dict[str, tuple[str, Any, Callable[[Any], list[float]]]]:
    """Of each protocol: its path, a body whose second sample of three is too long, and where a
    reply has its numbers."""
    texts = [GOOD, TOO_LONG, GOOD]
    sentences = {"name": "sentences", "datatype": "BYTES", "shape": [3], "data": texts}
    infer = "/v2/models/reward_model/infer"
    # fmt: off
    return {
        "OpenRLHF": ("/get_reward", openrlhf(texts), lambda r: r["rewards"]),
        "vLLM classify": (
            "/classify", {"input": texts}, lambda r: [one["probs"][0] for one in r["data"]]
        ),
        "vLLM pooling": (
            "/pooling", {"input": texts}, lambda r: [one["data"][0] for one in r["data"]]
        ),
        "vLLM tokens": (
            "/pooling", {"input": texts, "task": "token_classify"},
            lambda r: [one["data"][-1][0] for one in r["data"]],
        ),
        "OpenAI": (
            "/v1/embeddings", {"input": texts}, lambda r: [one["embedding"][0] for one in r["data"]]
        ),
        "SGLang classify": (
            "/classify", {"text": texts}, lambda r: [one["embedding"][0] for one in r]
        ),
        "SGLang score": (
            "/v1/score", {"query": "a ", "items": texts}, lambda r: [s for [s] in r["scores"]]
        ),
        "TEI": (
            "/predict", {"inputs": [[text] for text in texts], "raw_scores": True},
            lambda r: [one["score"] for [one] in r],
        ),
        "LLaMA-Factory": ("/v1/score/evaluation", {"messages": texts}, lambda r: r["scores"]),
        "KServe": (infer, {"inputs": [sentences]}, lambda r: r["outputs"][0]["data"]),
    }
    # fmt: on


@pytest.mark.parametrize("protocol", bad_among_good())
def test_a_sample_that_cannot_be_scored_gets_the_error_reward(
    http: httpx.Client, lenient: httpx.Client, protocol: str
) -> None:
    path, body, numbers = bad_among_good()[protocol]
    refused = http.post(path, json=body)
    assert refused.status_code == 422
    assert "too_long" in refused.text
    reply = lenient.post(path, json=body)
    assert reply.status_code == 200, reply.text
    first, substitute, last = numbers(reply.json())
    assert substitute == ERROR_REWARD
    assert first == last != ERROR_REWARD
    assert reply.headers[ERROR_REWARDS_HEADER] == "1"
    short = json.loads(json.dumps(body).replace(TOO_LONG, GOOD))
    whole = http.post(path, json=short)
    assert numbers(whole.json()) == close([first] * 3), "the others' rewards are what they were"


def test_one_sample_alone_gets_the_error_reward(lenient: httpx.Client) -> None:
    alone = {"prompt": "Hi.", "response": TOO_LONG}
    assert lenient.post("/reward/slime", json=alone).json() == ERROR_REWARD
    said = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": TOO_LONG}]
    classified = lenient.post("/classify", json={"messages": said}).json()
    assert classified["data"][0]["probs"] == [ERROR_REWARD]
    for error in ([6, 9999], []):  # of the vocabulary, and nothing at all
        reply = lenient.post("/classify", json={"input": [[5], error]})
        assert reply.json()["data"][1]["probs"] == [ERROR_REWARD]
    activated = lenient.post("/predict", json={"inputs": TOO_LONG}).json()
    assert activated[0]["score"] == pytest.approx(sigmoid(ERROR_REWARD)), "as any reward is"


def test_rewards_of_functions_go_by_their_names(lenient: httpx.Client, http: httpx.Client) -> None:
    texts = [GOOD, TOO_LONG]
    logs = lenient.post("/get_reward", json={"query": texts}).json()["extra_logs"]
    assert logs["brevity"] == [-len(GOOD), ERROR_REWARD]
    body = {"groups": [{"prompt": "Hi.", "completions": ["Hello.", "What?", TOO_LONG]}]}
    [plain], [named] = (
        client.post("/v1/score", json=body).json()["results"] for client in (http, lenient)
    )
    assert plain["named_rewards"] is None
    assert named["named_rewards"] == {"model": named["rewards"], "brevity": [-6, -5, None]}
    assert named["rewards"] == close(plain["rewards"])
    ids = {"groups": [{"prompt_ids": [5, 6], "completion_ids": [[7], [8, 9]]}]}
    [by_ids] = lenient.post("/v1/score", json=ids).json()["results"]
    assert by_ids["named_rewards"]["model"] == by_ids["rewards"]
    assert all(reward < 0 for reward in by_ids["named_rewards"]["brevity"])
    assert lenient.get("/info").json()["functions"] == {"brevity": 0.0}


def test_nothing_but_a_samples_error_gets_the_error_reward(lenient: httpx.Client) -> None:
    for path, body, status in (
        ("/get_reward", {"query": ["fine", 7]}, 422),
        ("/classify", {"input": ["fine"], "model": "another"}, 404),
        ("/v1/score", {"query": "a", "items": ["b"] * 10_001}, 413),
    ):
        assert lenient.post(path, json=body).status_code == status


def test_the_native_route_has_no_error_reward(lenient: httpx.Client) -> None:
    group = {"prompt": "Hi.", "completions": ["Hello.", TOO_LONG]}
    reply = lenient.post("/v1/score", json={"groups": [group]})
    [result] = reply.json()["results"]
    assert result["rewards"][1] is None
    assert result["errors"][1]["type"] == "too_long"
    assert ERROR_REWARDS_HEADER not in reply.headers
    with RewardClient(str(lenient.base_url)) as client:
        scores = client.score("Hi.", ["Hello.", TOO_LONG])
        assert scores.rewards == [close(result["rewards"][0]), None]
        assert client.info().error_reward == ERROR_REWARD


@pytest.mark.parametrize("value", ["nan", "inf", "none", None, [1.0]])
def test_an_error_reward_is_a_finite_number(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^error_reward is .*: it must be a finite number, or re"):
        validate(ServeConfig, {"model": "m", "error_reward": value})
    assert validate(ServeConfig, {"model": "m", "error_reward": "-10"}).error_reward == -10.0


@pytest.fixture(scope="module")
def raw_url(service: str, seeds: list[Path]) -> Iterator[str]:
    """A service that answers other systems with raw scores of a model that is normalised."""
    config = ServeConfig(model=str(seeds[1]), drop_in_scores="raw_score")
    yield from application(service, "raw", config)


def test_raw_scores_can_be_had_for_all_of_them(raw_url: str, seeds: list[Path]) -> None:
    scorer = RewardScorer.from_pretrained(seeds[1], "cpu")
    [expected] = scorer.score([Group(prompt_ids=[5], completion_ids=[[6, 7]])])
    assert expected.rewards != close(expected.raw_scores)
    bodies: list[tuple[str, dict[str, Any]]] = [
        ("/classify", {"input": [5, 6, 7]}),
        ("/v1/score", {"query": [5], "items": [[6, 7]]}),
        ("/pooling", {"input": [5, 6, 7], "task": "token_classify"}),
        ("/v1/score", {"groups": [{"prompt_ids": [5], "completion_ids": [[6, 7]]}]}),
    ]
    with httpx.Client(timeout=60) as client:
        replies = [client.post(raw_url + path, json=body).json() for path, body in bodies]
    classified, scored, refused, native = replies
    assert classified["data"][0]["probs"] == close(expected.raw_scores)
    assert scored["scores"][0] == close(expected.raw_scores)
    assert "token_rewards" in refused["error"]["message"]
    assert native["results"][0]["rewards"] == close(expected.rewards)
