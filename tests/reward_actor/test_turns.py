"""No turn of a conversation vanishes in a chat template, in training or in scoring."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from chat_systems import CHAT_SYSTEMS, letters_tokenizer
from transformers import LlamaConfig

from reward_actor import Group
from reward_actor.groups import SampleError
from reward_actor.model.inferred import contract_for
from reward_actor.render import Renderer, RenderError

NETWORK = LlamaConfig(vocab_size=400, max_position_embeddings=8192)
KNOWS_THREE_ROLES = (
    "{% for m in messages %}{% if m.role in ('system', 'user', 'assistant') %}"
    "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
)
FIRST_SYSTEM_ONLY = (
    "{% for m in messages %}{% if m.role != 'system' or loop.first %}"
    "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
)
NAMES_OF_CALLS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}"
)
ENDS_A_CALL_OTHERWISE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c | tojson }}{% endfor %}"
    "{{ '<|eom|>' if m.tool_calls else '<|im_end|>' }}{{ '\\n' }}{% endfor %}"
)
FIRST_PART_ONLY = (
    "{% for m in messages %}"
    "{% set text = m.content if m.content is string else m.content[0].text %}"
    "{{ '<|im_start|>' + m.role + '\\n' + text + '<|im_end|>\\n' }}{% endfor %}"
)
USER = {"role": "user", "content": "Name two fruits."}
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}


def renderer(template: str | None = None, name: str = "qwen 2.5") -> Renderer:
    tokenizer = letters_tokenizer(CHAT_SYSTEMS[name])
    tokenizer.chat_template = template or tokenizer.chat_template
    return Renderer(tokenizer, contract_for(tokenizer, NETWORK, format="chat"))


@pytest.mark.parametrize(
    ("template", "prompt", "lost"),
    [
        (
            KNOWS_THREE_ROLES,
            [{"role": "human", "content": "Hi."}],
            r"the content of message 0 \(role 'human'\)",
        ),
        (
            KNOWS_THREE_ROLES,
            [USER, {"role": "tool", "content": "17 degrees"}],
            r"the content of message 1 \(role 'tool'\)",
        ),
        (FIRST_SYSTEM_ONLY, [SYSTEM, USER, SYSTEM], r"the content of message 2 \(role 'system'\)"),
        (
            KNOWS_THREE_ROLES,
            [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}],
            r"tool call 0 of message 1 \(role 'assistant'\)",
        ),
        (
            NAMES_OF_CALLS,
            [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}],
            r"the arguments of tool call 0 of message 1 \(role 'assistant'\)",
        ),
    ],
)
def test_what_a_template_leaves_out_is_named(template: str, prompt: Any, lost: str) -> None:
    render = renderer(template)
    for _ in range(2):  # the second time from what was kept
        with pytest.raises(RenderError, match=f"leaves out {lost}"):
            render.render(prompt, "Apples.")
    (error,) = render.sequences(Group(prompt, ["Apples."]))
    assert isinstance(error, SampleError)
    assert error.type == "unrenderable"


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALLS = [
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "17 degrees", "tool_call_id": "1"},
]


@pytest.mark.parametrize("name", ["qwen 2.5", "qwen 3", "llama 3.1", "llama 3.2"])
@pytest.mark.parametrize("before", [[], [SYSTEM]])
def test_templates_with_tools_write_tools_calls_and_results(name: str, before: list[Any]) -> None:
    render = renderer(name=name)
    for prompt in ([*before, USER], [*before, USER, *CALLS]):
        for tools in ([WEATHER], [WEATHER, {**WEATHER, "extra": "x"}]):
            text = render.tokenizer.decode(render.render(prompt, "Warm.", tools=tools))
            assert "Tells the weather." in text
    scored = render.render([*before, USER], CALLS[0], tools=[WEATHER])
    assert "Rome" in render.tokenizer.decode(scored)


@pytest.mark.parametrize("name", ["llama 3", "gemma 2", "deepseek 3"])
def test_tools_that_a_template_ignores_are_named(name: str) -> None:
    render = renderer(name=name)
    render.render([USER], "Warm.")
    with pytest.raises(RenderError, match="leaves out tool 1"):
        render.render([USER], "Warm.", tools=[{"type": "web_search"}, WEATHER])


def test_a_scored_call_ends_with_the_contracts_end_or_is_refused() -> None:
    render = renderer(ENDS_A_CALL_OTHERWISE)
    render.render([USER], "Warm.")
    with pytest.raises(RenderError, match=r"leaves out tool call 0 of message 1"):
        render.render([USER], CALLS[0])


def test_parts_of_text_are_one_text_before_a_template_sees_them() -> None:
    parts = [{"type": "text", "text": text} for text in ("a", "b")]
    render = renderer(FIRST_PART_ONLY)
    whole = render.render([{"role": "user", "content": "a\nb"}], "A cat.")
    assert render.render([{"role": "user", "content": parts}], "A cat.") == whole


def test_what_is_not_text_is_named() -> None:
    picture = [{"role": "user", "content": [{"type": "image", "image": "x.png"}]}]
    with pytest.raises(
        RenderError, match=r"prompt.0.content.\d is of type 'image'; a reward model reads text"
    ):
        renderer(FIRST_PART_ONLY).render(picture, "A cat.")


@pytest.mark.parametrize("name", CHAT_SYSTEMS)
def test_known_templates_leave_no_ordinary_turn_out(name: str) -> None:
    render = renderer(name=name)
    again = [USER, {"role": "assistant", "content": "Apples."}, USER]
    for prompt in ([USER], again, [{"role": "user", "content": "  "}]):
        render.render(prompt, "Pears.")
        render.render(prompt, "")


def test_reasoning_of_earlier_turns_may_go_and_calls_stay() -> None:
    render = renderer(name="qwen 3")
    earlier = {"role": "assistant", "content": "<think>\npondering\n</think>\n\nApples."}
    ids = render.render([USER, earlier, USER], "Pears.")
    assert "pondering" not in render.tokenizer.decode(ids)
    called = [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    called.append({"role": "tool", "content": "17 degrees"})
    text = render.tokenizer.decode(render.render(called, "Warm."))
    assert "weather" in text
    assert "17 degrees" in text


def test_whatever_a_message_holds_it_is_looked_at_once_for_each_shape() -> None:
    from datetime import date

    render = renderer()
    for number in range(3):
        message = {**USER, "weight": 0.1 * number, "at": date(2026, 1, 1 + number)}
        render.render([message], "Apples.")
    assert len(render._lost) == 1


def test_a_template_that_reads_its_contents_is_not_judged_by_others() -> None:
    template = (
        "{% for m in messages %}{% if m.content not in ('a', 'b') %}{{ raise_exception('odd') }}"
        "{% endif %}{{ m.content + '<|im_end|>' }}{% endfor %}"
    )
    tokenizer = letters_tokenizer(CHAT_SYSTEMS["qwen 2.5"])
    contract = contract_for(tokenizer, NETWORK, format="chat")
    render = Renderer(tokenizer, replace(contract, chat_template=template))
    assert tokenizer.decode(render.render("a", "b")) == "a<|im_end|>b<|im_end|>"
    with pytest.raises(RenderError, match="odd"):
        render.render("a", "c")
