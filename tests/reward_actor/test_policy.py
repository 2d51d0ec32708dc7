"""What a rollout sends to its scorer: token ids where they are the text's, otherwise the text."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from chat_systems import CHAT_SYSTEMS, letters_tokenizer
from conversations import ARGS, TEMPLATE
from safetensors.torch import load
from transformers import AutoModelForCausalLM, LlamaConfig

from reward_actor.groups import Group
from reward_actor.model.inferred import contract_for
from reward_actor.render import Renderer
from reward_actor.rollout.actor import travelling
from reward_actor.rollout.engine import ended_with_eos
from reward_actor.rollout.policy import as_safetensors, group_to_score
from reward_actor.rollout.records import RolloutGroup

NETWORK = LlamaConfig(vocab_size=400, max_position_embeddings=2048)
USER = [{"role": "user", "content": "Name two fruits."}]


def renderer(name: str) -> Renderer:
    tokenizer = letters_tokenizer(CHAT_SYSTEMS[name])
    return Renderer(tokenizer, contract_for(tokenizer, NETWORK, format="chat"))


def sampled(render: Renderer, *texts: str, end: str = "") -> RolloutGroup:
    ids = [render.tokenizer(text + end, add_special_tokens=False)["input_ids"] for text in texts]
    log_probs = [[0.0] * len(row) for row in ids]
    reasons = ["stop" if end else "length"] * len(texts)
    return RolloutGroup(
        USER,
        render.prompt_ids(USER),
        list(texts),
        ids,
        log_probs,
        finish_reasons=reasons,
    )


def scored_ids(render: Renderer, group: Group) -> list[object]:
    return list(render.sequences(group))


@pytest.mark.parametrize(
    ("name", "texts", "travels_as_ids"),
    [
        ("qwen 2.5", ("Apples.", "Pears.\n"), True),
        ("llama 3.1", ("Apples.",), True),
        ("llama 3.1", ("Apples.", "Pears.\n\n"), False),  # trimmed by the template
        ("qwen 3", ("Apples.",), False),  # a think block before the last answer
        ("qwen 2.5", ("Apples <|im_start|>",), False),  # what is spelled is text
    ],
)
def test_ids_travel_only_where_they_are_the_text(
    name: str, texts: tuple[str, ...], travels_as_ids: bool
) -> None:
    render = renderer(name)
    by_text = scored_ids(render, Group(USER, texts))
    for end in (render.contract.turn_end, ""):  # stopped by itself, and cut by its length
        group = group_to_score(sampled(render, *texts, end=end), render)
        assert (group.prompt_ids is not None) == travels_as_ids
        assert scored_ids(render, group) == by_text


@pytest.mark.parametrize(
    "scored",
    [{"end_text": "\n"}, {"plain_content": False}, {"final_token_id": 7}],
)
def test_what_travels_is_what_the_scorer_renders(scored: dict[str, Any]) -> None:
    policy = renderer("qwen 2.5")
    if "end_text" in scored:
        ends = policy.tokenizer("<|im_end|>\n", add_special_tokens=False)["input_ids"]
        scored = {**scored, "end_ids": ends}
    scorer = Renderer(policy.tokenizer, replace(policy.contract, **scored))
    rollout = sampled(policy, "Apples.", end="<|im_end|>")
    group = group_to_score(rollout, scorer)
    assert group.prompt_ids is not None
    assert scored_ids(scorer, group) == scored_ids(scorer, Group(USER, ["Apples."]))


def test_what_the_scorers_template_is_told_by_default_is_seen() -> None:
    tokenizer = letters_tokenizer(CHAT_SYSTEMS["qwen 2.5"])
    tokenizer.chat_template = TEMPLATE
    policy = Renderer(tokenizer, contract_for(tokenizer, NETWORK, format="chat"))
    rollout = sampled(policy, "Apples.", end="<|im_end|>")
    assert group_to_score(rollout, policy).prompt_ids is not None
    rendering = replace(policy.contract, template_args=ARGS).rendering
    scorer = Renderer(tokenizer, replace(policy.contract, **vars(rendering)))
    assert group_to_score(rollout, scorer) == Group(USER, ["Apples."])


def test_tokens_that_the_tokenizer_would_not_choose_travel_as_text() -> None:
    render = renderer("qwen 2.5")
    rollout = sampled(render, "Apples.", end="<|im_end|>")
    rollout.completion_ids[0][0] += 1
    assert group_to_score(rollout, render) == Group(USER, ["Apples."])


def test_a_prompt_that_cannot_be_rendered_travels_as_text() -> None:
    render = renderer("gemma 2")
    rollout = sampled(render, "Apples.", end="<end_of_turn>")
    rollout.prompt = [{"role": "system", "content": "Gemma knows no such role."}, *USER]
    assert group_to_score(rollout, render).prompt_ids is None


def test_a_scorer_travels_with_the_token_of_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYWARD_TOKEN", "rw_mine")
    packed = pickle.dumps(travelling("http://127.0.0.1:1"))
    monkeypatch.delenv("RAYWARD_TOKEN")
    client = pickle.loads(packed)
    assert client.arguments()["token"] == "rw_mine"
    assert travelling("rayward") == "rayward"


@pytest.mark.parametrize(
    ("finish_reason", "stop_reason", "expected"),
    [
        ("stop", None, True),
        ("stop", 107, True),  # Gemma's end of turn, which its generation config has
        ("stop", 300, False),  # of stop_token_ids
        ("stop", "\n\n", False),
        ("length", None, False),
    ],
)
def test_a_policy_may_end_with_several_tokens(
    finish_reason: str, stop_reason: int | str | None, expected: bool
) -> None:
    output = SimpleNamespace(finish_reason=finish_reason, stop_reason=stop_reason)
    assert ended_with_eos(output, frozenset({1, 107})) is expected


def test_a_networks_own_weights_travel(base_model: Path) -> None:
    """Its output head is its embedding, which a state_dict has twice and the policy's file once."""
    network = AutoModelForCausalLM.from_pretrained(base_model)
    given = network.state_dict()
    assert given["lm_head.weight"].data_ptr() == given["model.embed_tokens.weight"].data_ptr()
    found = load(as_safetensors(str(base_model), given).tobytes())
    assert found.keys() == given.keys() - {"lm_head.weight"}
    assert all(torch.equal(tensor, given[name]) for name, tensor in found.items())
