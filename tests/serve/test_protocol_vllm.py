"""vLLM's protocols on our service: what verl and OpenAI's client send, and what is refused."""

from __future__ import annotations

import base64
import math
import struct
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from offline import reward, templated
from pydantic import ValidationError

from reward_actor import Group
from reward_actor.groups import Whole
from serve.protocols.vllm_request import VllmRequest, to_group

if TYPE_CHECKING:
    import httpx

    from reward_actor import RewardScorer

CHAT = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]
ROWS = [[5, 6, 7], [5], [9, 10]]


def close(values: Any) -> Any:
    return pytest.approx(values, abs=1e-5)


def test_classify_as_verl_calls_it(http: httpx.Client, offline: RewardScorer) -> None:
    text = templated(offline, "Hi.", "Hello.")
    num = len(offline.renderer.render("Hi.", "Hello."))
    for flag in ("use_activation", "activation"):
        body = {"model": "reward-model", "input": text, flag: False}
        reply = http.post("/classify", json=body).json()
        assert reply["id"].startswith("classify-")
        assert reply["created"] > 1.7e9
        assert {k: v for k, v in reply.items() if k not in ("id", "created")} == {
            "object": "list",
            "model": "reward-model",
            "data": [
                {
                    "index": 0,
                    "label": "reward",
                    "probs": [close(reward(offline, "Hi.", "Hello."))],
                    "num_classes": 1,
                }
            ],
            "usage": {"prompt_tokens": num, "total_tokens": num, "completion_tokens": 0},
        }


def test_every_kind_of_input(http: httpx.Client, offline: RewardScorer) -> None:
    texts = [templated(offline, "Hi.", completion) for completion in ("Hello.", "What?")]
    of_texts = [reward(offline, "Hi.", completion) for completion in ("Hello.", "What?")]
    of_rows = offline.score_ids(ROWS).tolist()
    cases: list[tuple[Any, list[float]]] = [
        (texts[0], of_texts[:1]),
        (texts, of_texts),
        (ROWS[0], of_rows[:1]),
        (ROWS, of_rows),
    ]
    for asked, expected in cases:
        classified = http.post("/classify", json={"input": asked}).json()
        assert [item["probs"][0] for item in classified["data"]] == close(expected)
        pooled = http.post("/pooling", json={"input": asked, "task": "classify"}).json()
        assert [item["data"] for item in pooled["data"]] == [[close(r)] for r in expected]
        assert {item["object"] for item in pooled["data"]} == {"pooling"}
        embedded = http.post("/v1/embeddings", json={"input": asked, "model": None}).json()
        assert [item["embedding"][-1] for item in embedded["data"]] == close(expected)
        assert {item["object"] for item in embedded["data"]} == {"embedding"}
        for reply in (classified, pooled, embedded):
            assert [item["index"] for item in reply["data"]] == list(range(len(expected)))


def test_a_conversation(http: httpx.Client, offline: RewardScorer) -> None:
    expected = reward(offline, "Hi.", "Hello.")
    parts = [{"type": "text", "text": "Hi."}]
    for first in (CHAT[0], {"role": "user", "content": parts, "name": "someone"}):
        body = {
            "messages": [first, CHAT[1]],
            "add_generation_prompt": False,
            "add_special_tokens": False,
            "chat_template_kwargs": {"enable_thinking": False},
        }
        for path, key in (("/classify", "probs"), ("/pooling", "data")):
            [item] = http.post(path, json=body).json()["data"]
            assert item[key] == [close(expected)]
    lines = [{"type": "text", "text": text} for text in ("one", "two")]
    [item] = http.post(
        "/classify", json={"messages": [{"role": "user", "content": lines}, CHAT[1]]}
    ).json()["data"]
    assert item["probs"] == [close(reward(offline, "one\ntwo", "Hello."))]
    [item] = http.post("/classify", json={"messages": CHAT[1:]}).json()["data"]
    assert item["probs"] == [close(reward(offline, [], "Hello."))]


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"messages": CHAT[:1]}, 422, "the assistant's"),
        ({"messages": []}, 422, "messages"),
        ({"messages": [*CHAT[:1], {"role": "assistant", "content": None}]}, 422, "with content"),
        ({"messages": [{**CHAT[0], "name": 5}, CHAT[1]]}, 422, "messages.0.name is int, not text"),
        (
            {"messages": [CHAT[0], {**CHAT[1], "tool_calls": "x"}]},
            422,
            "messages.1.tool_calls is not a list of calls",
        ),
        ({"messages": CHAT, "add_generation_prompt": True}, 422, "none would follow"),
        ({"messages": CHAT, "continue_final_message": True}, 422, "end of its turn"),
        ({"messages": CHAT, "chat_template": "{{ 1 }}"}, 422, "trained with"),
        ({"messages": CHAT, "add_special_tokens": True}, 422, "add_special_tokens"),
        ({"messages": CHAT, "truncate_prompt_tokens": 5}, 422, "truncate_prompt_tokens"),
        ({"messages": CHAT, "chat_template_kwargs": {"tools": []}}, 422, "tools"),
        ({"messages": CHAT, "input": "Hi."}, 422, "not both"),
        ({"input": []}, 422, "at least 1 item"),
        ({"input": {"a": 1}}, 422, "input"),
        ({"input": ["a", 1]}, 422, "input.1"),
        ({"input": [1, "a"]}, 422, "input.0.1"),
        ({"input": "Hi.", "truncate_prompt_tokens": -2}, 422, "greater than"),
        ({"input": "Hi.", "truncate_prompt_tokens": 0}, 422, "empty_sequence"),
        ({"input": "Hi.", "model": "other"}, 404, "'reward-model'"),
        ({"input": "word " * 400}, 422, "too_long"),
    ],
)
def test_what_is_refused(http: httpx.Client, body: Any, status: int, message: str) -> None:
    for path in ("/classify", "/pooling", "/v1/embeddings"):
        reply = http.post(path, json=body)
        assert reply.status_code == status
        assert message in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tools", [{"name": "f"}]),
        ("chat_template_kwargs", {"a": 1}),
        ("chat_template", "{{ 1 }}"),
        ("add_generation_prompt", True),
        ("continue_final_message", True),
    ],
)
def test_what_belongs_to_messages_is_refused_with_input(name: str, value: Any) -> None:
    for body in ({"input": "Hi."}, {"input": [[5]]}):
        VllmRequest.model_validate({**body, name: type(value)()})
        with pytest.raises(ValidationError, match=f"{name} cannot be set with input"):
            VllmRequest.model_validate({**body, name: value})


def test_an_image_is_refused(http: httpx.Client) -> None:
    image = {"type": "image_url", "image_url": {"url": "https://canary"}}
    body = {"messages": [{"role": "user", "content": [image]}, CHAT[1]]}
    reply = http.post("/classify", json=body)
    assert reply.status_code == 422
    message = reply.json()["error"]["message"]
    assert message.startswith("messages.0.content: ")
    assert "is of type 'image_url'; a reward model reads text" in message
    assert "canary" not in reply.text


def test_the_models_directory_is_its_name_too(http: httpx.Client, export_dir: Any) -> None:
    body = {"input": ROWS, "model": str(export_dir)}
    assert http.post("/classify", json=body).status_code == 200


def test_a_sigmoid_when_asked_for(http: httpx.Client, offline: RewardScorer) -> None:
    expected = [1 / (1 + math.exp(-r)) for r in offline.score_ids(ROWS).tolist()]
    for flag in ("use_activation", "activation"):
        data = http.post("/classify", json={"input": ROWS, flag: True}).json()["data"]
        assert [item["probs"][0] for item in data] == close(expected)


def test_a_value_for_every_token(http: httpx.Client, offline: RewardScorer) -> None:
    expected = [row.tolist() for row in offline.token_rewards(ROWS)]
    reply = http.post("/pooling", json={"input": ROWS, "task": "token_classify"}).json()
    assert [item["data"] for item in reply["data"]] == [
        [[close(value)] for value in row] for row in expected
    ]
    assert reply["usage"]["prompt_tokens"] == 6
    refused = http.post("/pooling", json={"input": ROWS, "task": "embed"})
    assert refused.status_code == 422
    assert "token_classify" in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    ("side", "kept"), [(None, slice(5)), ("right", slice(5)), ("left", slice(-5, None))]
)
def test_ids_are_cut_when_asked(
    http: httpx.Client, offline: RewardScorer, side: str | None, kept: slice
) -> None:
    ids = list(range(3, 303))
    body: dict[str, Any] = {"input": ids, "truncate_prompt_tokens": 5, "truncation_side": side}
    [item] = http.post("/classify", json=body).json()["data"]
    assert item["probs"] == close(offline.score_ids([ids[kept]]).tolist())
    [item] = http.post("/classify", json={**body, "truncate_prompt_tokens": -1}).json()["data"]
    limit = offline.contract.max_length
    whole = ids[-limit:] if side == "left" else ids[:limit]
    assert item["probs"] == close(offline.score_ids([whole]).tolist())


def test_base64_is_float32(http: httpx.Client, offline: RewardScorer) -> None:
    body = {"input": ROWS[0], "encoding_format": "base64"}
    [item] = http.post("/v1/embeddings", json=body).json()["data"]
    [value] = struct.unpack("<f", base64.b64decode(item["embedding"]))
    assert [value] == close(offline.score_ids(ROWS[:1]).tolist())


def test_openais_own_client(service: str, offline: RewardScorer) -> None:
    """It asks for base64 unless told otherwise."""
    import openai

    with openai.OpenAI(base_url=service + "/v1", api_key="none", max_retries=0) as client:
        for encoding in ({}, {"encoding_format": "float"}):
            found = client.embeddings.create(model="reward-model", input=ROWS, **encoding)
            assert [d.embedding[0] for d in found.data] == close(offline.score_ids(ROWS).tolist())
            assert found.usage.prompt_tokens == 6
        with pytest.raises(openai.NotFoundError, match="reward-model"):
            client.embeddings.create(model="other", input="Hi.")


texts = st.lists(st.text(max_size=5), min_size=1, max_size=3)
rows = st.lists(st.lists(st.integers(0, 9), max_size=5), min_size=1, max_size=3)


@given(
    st.one_of(texts, rows), st.none() | st.booleans(), st.none() | st.integers(-1, 9), st.booleans()
)
def test_input_becomes_whole_sequences(
    given_input: Any, adds: bool | None, cut: int | None, left: bool
) -> None:
    request = VllmRequest(
        input=given_input,
        add_special_tokens=adds,
        truncate_prompt_tokens=cut,
        truncation_side="left" if left else None,
    )
    limits: dict[str, Any] = {
        "max_tokens": "model" if cut == -1 else cut,
        "keep": "right" if left else "left",
    }
    if isinstance(given_input[0], str):
        expected = Whole(given_input, add_special_tokens=adds is not False, **limits)
    else:
        expected = Whole(ids=given_input, **limits)
    assert to_group(request) == expected


def test_messages_become_a_group() -> None:
    thinking = {"enable_thinking": True}
    request = VllmRequest(messages=CHAT, chat_template_kwargs=thinking)  # type: ignore[arg-type]
    assert to_group(request) == Group(CHAT[:1], ["Hello."], template_args=thinking)
