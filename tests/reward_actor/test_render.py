"""Rendering: a completion ends at its turn-end token, and text and token ids agree."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from templates import LLAMA_LIKE, NO_END_TOKEN, THINKING, renderer, texts

from reward_actor.contract import ScoringContract
from reward_actor.groups import Group, SampleError, Whole
from reward_actor.model.inferred import contract_for
from reward_actor.model.tokenizer import load_tokenizer, tokenizer_fingerprint
from reward_actor.render import Renderer, RenderError

ALTERNATING = (
    "{% if messages[0].role != 'user' %}{{ raise_exception('must begin with user') }}{% endif %}"
    "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
)


@pytest.fixture(scope="module")
def tokenizer(base_model: Path) -> Any:
    return load_tokenizer(base_model)


@pytest.mark.parametrize("template", [None, THINKING, LLAMA_LIKE], ids=["chatml", "think", "llama"])
@given(prompt=texts, completion=texts)
def test_a_completion_ends_at_its_turn_end_token(
    template: str | None, tokenizer: Any, base_model: Path, prompt: str, completion: str
) -> None:
    render = renderer(tokenizer, base_model, template)
    assert render.contract.turn_end == "<|im_end|>"
    assert render.render(prompt, completion)[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")


@pytest.mark.parametrize("template", [None, THINKING, LLAMA_LIKE], ids=["chatml", "think", "llama"])
@given(prompt=texts, completion=texts)
def test_text_and_token_ids_agree_where_retokenising_does(
    template: str | None, tokenizer: Any, base_model: Path, prompt: str, completion: str
) -> None:
    render = renderer(tokenizer, base_model, template)
    prompt_ids = render.prompt_ids(prompt)
    sampled = tokenizer.encode(completion + "<|im_end|>", add_special_tokens=False)
    whole = tokenizer.decode(prompt_ids + sampled)
    if tokenizer.encode(whole, add_special_tokens=False) == prompt_ids + sampled:
        assert render.render(prompt, completion) == prompt_ids + sampled


@pytest.mark.parametrize("template", [None, THINKING, LLAMA_LIKE, NO_END_TOKEN])
def test_the_prompts_share_of_a_sample_is_what_a_policy_continues(
    tokenizer: Any, base_model: Path, template: str | None
) -> None:
    render = renderer(tokenizer, base_model, template)
    group = Group("Name two fruits.", ["Apples.", "word " * 500, ""])
    samples = render.sequences(group)
    prompt_ids = render.prompt_ids("Name two fruits.")
    # "assistant: " and "Apples" may meet within one token, which is then the completion's.
    shared = len(prompt_ids) - (template in (LLAMA_LIKE, NO_END_TOKEN))
    lengths = render.num_prompt_tokens(group, samples)
    assert lengths is not None
    assert shared <= lengths[0] <= len(prompt_ids)
    assert isinstance(samples[1], SampleError)
    assert lengths[1] == 0
    sent = Group(prompt_ids=[5, 6], completion_ids=[[7], []])
    assert render.num_prompt_tokens(sent, render.sequences(sent)) == [2, 2]
    whole = Whole(ids=[[5, 6]])
    assert render.num_prompt_tokens(whole, render.sequences(whole)) is None


def test_a_template_without_an_end_token_keeps_no_trailing_blanks(
    tokenizer: Any, base_model: Path
) -> None:
    render = renderer(tokenizer, base_model, NO_END_TOKEN)
    assert tokenizer.decode(render.render("a", "b")) == "user: a\n\nassistant: b"


def test_a_completion_that_its_template_does_not_end_is_refused(
    tokenizer: Any, base_model: Path
) -> None:
    conditional = (
        "{% for m in messages %}{{ m.content }}"
        "{% if 'stop' not in m.content %}<|im_end|>{% endif %}{% endfor %}"
    )
    render = renderer(tokenizer, base_model, conditional)
    with pytest.raises(RenderError, match="did not end the completion"):
        render.render("stop a", "stop b")


def test_a_template_that_writes_the_date_writes_that_of_its_contract(
    tokenizer: Any, base_model: Path
) -> None:
    dated = "{{ strftime_now('%d %B %Y') }}: " + LLAMA_LIKE
    render = renderer(tokenizer, base_model, dated)
    assert render.contract.template_date is not None
    old = Renderer(tokenizer, replace(render.contract, template_date="2024-07-26"))
    assert tokenizer.decode(old.render("a", "b")).startswith("26 July 2024: [user] a")
    assert old.prompt_ids("a") != render.prompt_ids("a")
    assert renderer(tokenizer, base_model, None).contract.template_date is None


@pytest.mark.parametrize("pad", ["<|endoftext|>", "<|im_end|>", None])
def test_what_pads_never_ends_a_text(base_model: Path, pad: str | None) -> None:
    from transformers import AutoConfig

    tokenizer = load_tokenizer(base_model)
    tokenizer.pad_token = pad
    for format in ("chat", "text"):
        contract = contract_for(tokenizer, AutoConfig.from_pretrained(base_model), format=format)
        assert contract.pad_token_id != tokenizer.eos_token_id


def test_a_string_prompt_is_one_user_message(tokenizer: Any, base_model: Path) -> None:
    render = renderer(tokenizer, base_model, None)
    messages = [{"role": "user", "content": "Hi."}]
    assert render.render("Hi.", "Yes?") == render.render(messages, "Yes?")


def test_under_text_a_prompt_is_a_prefix_and_eos_ends_it(tokenizer: Any, base_model: Path) -> None:
    render = renderer(tokenizer, base_model, None, format="text")
    ids = render.render("one, ", "two")
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids[:-1]) == "one, two"
    assert ids == render.render("", "one, two")
    with pytest.raises(RenderError, match="needs a chat contract"):
        render.render([{"role": "user", "content": "Hi."}], "Yes?")


def test_what_cannot_be_rendered_is_an_error_of_its_sample(
    tokenizer: Any, base_model: Path
) -> None:
    render = renderer(tokenizer, base_model, None, max_length=64)
    fine, surrogate, long = render.sequences(Group("Hi.", ["Yes?", "a\ud800", "word " * 99]))
    assert isinstance(fine, list)
    assert isinstance(surrogate, SampleError)
    assert surrogate.type == "unrenderable"
    assert isinstance(long, SampleError)
    assert long.type == "too_long"
    assert "max_length is 64" in long.message


def test_a_template_that_refuses_the_roles_is_quoted(tokenizer: Any, base_model: Path) -> None:
    render = renderer(tokenizer, base_model, ALTERNATING)
    [refused] = render.sequences(Group([{"role": "assistant", "content": "I begin."}], ["No."]))
    assert isinstance(refused, SampleError)
    assert "must begin with user" in refused.message


@pytest.mark.parametrize(
    ("ids", "type_"),
    [
        ([], "empty_sequence"),
        ([10**6], "token_out_of_vocabulary"),
        ([-1], "token_out_of_vocabulary"),
    ],
)
def test_ids_are_checked(tokenizer: Any, base_model: Path, ids: list[int], type_: str) -> None:
    [refused] = renderer(tokenizer, base_model, None).sequences(
        Group(prompt_ids=[], completion_ids=[ids])
    )
    assert isinstance(refused, SampleError)
    assert refused.type == type_


def test_the_fingerprint_sees_the_template_and_the_vocabulary(
    tokenizer: Any, base_model: Path, tmp_path: Path
) -> None:
    contract: ScoringContract = renderer(tokenizer, base_model, None).contract
    own = tokenizer_fingerprint(tokenizer, contract)
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    again("pads", padding="max_length", max_length=8, truncation=True)  # leaves settings behind
    assert tokenizer_fingerprint(again) == own
    assert (
        tokenizer_fingerprint(tokenizer, renderer(tokenizer, base_model, THINKING).contract) != own
    )
    again.add_tokens(["<new>"])
    assert tokenizer_fingerprint(again, contract) != own


def test_chat_without_a_template_is_refused(base_model: Path) -> None:
    from transformers import AutoConfig

    bare = load_tokenizer(base_model)
    bare.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        contract_for(bare, AutoConfig.from_pretrained(base_model), format="chat")
