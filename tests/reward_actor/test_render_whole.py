"""Whole sequences: text that others have templated gives the same ids as messages do."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_systems import CHAT_SYSTEMS, letters_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from templates import LLAMA_LIKE, NO_END_TOKEN, THINKING, renderer, texts

from reward_actor.groups import Group, SampleError, Whole, assemble, scorable
from reward_actor.model.inferred import contract_for
from reward_actor.model.tokenizer import load_tokenizer
from reward_actor.readout import Readout
from reward_actor.render import Renderer, RenderError
from reward_actor.token_ids import checked

TEMPLATES = [None, THINKING, LLAMA_LIKE, NO_END_TOKEN]
rows = st.lists(st.integers(3, 200), min_size=1, max_size=30)


@pytest.fixture(scope="module")
def tokenizer(base_model: Path) -> Any:
    return load_tokenizer(base_model)


@pytest.fixture(scope="module")
def each(tokenizer: Any, base_model: Path) -> list[Renderer]:
    return [renderer(tokenizer, base_model, template) for template in TEMPLATES]


@given(texts, texts)
def test_text_templated_by_its_sender_is_rendered_as_messages_are(
    each: list[Renderer], prompt: str, completion: str
) -> None:
    messages = [
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": completion},
    ]
    for own in each:
        text = own.tokenizer.apply_chat_template(
            messages, chat_template=own.contract.chat_template, tokenize=False
        )
        [ids] = own.sequences(Whole(texts=[text]))
        assert ids == checked(own.render(prompt, completion), own.contract)


def test_only_what_the_template_writes_is_left_out(renderers: dict[str, Renderer]) -> None:
    chat, text = renderers["chat"], renderers["text"]
    ended = "<|im_start|>user\nHi.<|im_end|>"
    for rest in ("\n\n", " ", "\nx"):
        [ids] = chat.sequences(Whole(texts=[ended + rest]))
        assert ids == chat.tokenizer(ended + rest)["input_ids"]
    eos = text.contract.eos_token_id
    [ids] = text.sequences(Whole(texts=["Hi.\n"]))
    assert ids == [*text.tokenizer("Hi.\n")["input_ids"], eos]
    assert text.sequences(Whole(texts=["Hi.\n<|im_end|>"])) == [ids], "EOS is there already"


@given(rows, st.integers(0, 40), st.sampled_from(["left", "right"]))
def test_ids_are_cut_only_when_asked(
    renderers: dict[str, Renderer], ids: list[int], num: int, keep: Any
) -> None:
    chat = renderers["chat"]
    assert chat.sequences(Whole(ids=[ids])) == [ids]
    [cut] = chat.sequences(Whole(ids=[ids], max_tokens=num, keep=keep))
    kept = ids[:num] if keep == "left" else ids[max(0, len(ids) - num) :]
    if num:
        assert cut == kept
    else:
        assert isinstance(cut, SampleError)
        assert cut.type == "empty_sequence"


def test_the_models_own_length_can_be_asked_for(renderers: dict[str, Renderer]) -> None:
    chat = renderers["chat"]
    ids = [*range(3, 103)]
    [too_long] = chat.sequences(Whole(ids=[ids]))
    assert isinstance(too_long, SampleError)
    assert too_long.type == "too_long"
    assert chat.sequences(Whole(ids=[ids], max_tokens="model", keep="left")) == [ids[:64]]
    assert chat.sequences(Whole(ids=[ids], max_tokens="model")) == [ids[-64:]]


def test_scores_say_which_samples_were_cut(renderers: dict[str, Renderer]) -> None:
    chat = renderers["chat"]
    by_ids = chat.sequences(Whole(ids=[[5, 6, 7], [5, 6], []], max_tokens=2))
    by_text = chat.sequences(Whole(texts=["Hi. " * 9, "Hi."], max_tokens=4, keep="left"))
    uncut = chat.sequences(Group(prompt_ids=[5], completion_ids=[[6, 7, 8]]))
    rendered = [by_ids, by_text, uncut]
    raw = np.zeros((len(scorable(rendered)), 1), np.float32)
    scores = assemble(rendered, raw, Readout.of(chat.contract), "sha256:0")
    assert [group.truncated for group in scores] == [[True, False, False], [True, False], [False]]


def test_a_text_without_a_form_is_an_error_of_its_own(renderers: dict[str, Renderer]) -> None:
    fine, bad, empty = renderers["chat"].sequences(Whole(texts=["fine", "\ud800", ""]))
    assert fine == renderers["chat"].tokenizer("fine")["input_ids"]
    assert isinstance(bad, SampleError)
    assert bad.type == "unrenderable"
    assert isinstance(empty, SampleError)
    assert empty.type == "empty_sequence"


@pytest.mark.parametrize("name", CHAT_SYSTEMS)
def test_every_system_knows_its_own_conversations(name: str) -> None:
    from transformers import LlamaConfig

    own = letters_tokenizer(CHAT_SYSTEMS[name])
    network = LlamaConfig(vocab_size=400, max_position_embeddings=4096)
    render = Renderer(own, contract_for(own, network, format="chat"))
    later = replace(
        render.contract, template_date="2031-05-06" * bool(render.contract.template_date) or None
    )
    user = {"role": "user", "content": "Hi."}
    for day in (render, Renderer(own, later)):  # a policy renders on another day
        for messages in ([user], [{"role": "system", "content": "Be brief."}, user]):
            with contextlib.suppress(RenderError):
                text = day.prompts.apply_template(messages, generation=True)
                assert render.is_templated(text)
                if messages[0] is user:  # a system prompt may be the first thing behind a BOS
                    assert render.is_templated(text.removeprefix(own.bos_token or ""))
    for text in ("Hi.", "What does <|im_end|> mean?", "<|", "<b>Hi.</b>", ""):
        assert not render.is_templated(text)


def test_templated_text_is_told_by_its_beginning(renderers: dict[str, Renderer]) -> None:
    templated = "<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\n"
    assert renderers["chat"].is_templated(templated)
    assert renderers["chat"].is_templated("<|im_start|>system\nBe brief.<|im_end|>\n" + templated)
    assert not renderers["chat"].is_templated("What does <|im_end|> mean?")
    assert not renderers["chat"].is_templated("im_start Hi.")
    assert not renderers["text"].is_templated(templated)
