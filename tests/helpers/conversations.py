"""A conversation with all that training renders, and a template that writes all of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from chat_systems import CHAT_SYSTEMS, letters_tokenizer

if TYPE_CHECKING:
    from reward_actor.render import Renderer

TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}{% endfor %}<|im_end|>\n"
    "{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if brief is defined and brief and loop.last %}(brief) {% endif %}"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}</call>"
    "{{ c.function.arguments | tojson }}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOLS = [
    {
        "type": "function",
        "function": {"name": "weather", "description": None, "parameters": {"type": "object"}},
    }
]
CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": {"at": None}}}
ASKED = [
    {
        "role": "user",
        "content": [{"type": "text", "text": "Rain?"}, {"type": "text", "text": "Now."}],
    },
    {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "I look."},
    {"role": "tool", "content": "3 mm", "tool_call_id": "1"},
]
CALLING = {**ASKED[1], "name": "bot"}
ARGS = {"brief": True}
ANSWER = "Yes."
ROW = {"prompt": ASKED, "completions": [ANSWER], "tools": TOOLS, "chat_template_kwargs": ARGS}


def tool_renderer() -> Renderer:
    from families import make_network

    from reward_actor.model.inferred import contract_for
    from reward_actor.render import Renderer

    tokenizer = letters_tokenizer(CHAT_SYSTEMS["qwen 2.5"])
    tokenizer.chat_template = TEMPLATE
    network = make_network("qwen3", pad_token_id=tokenizer.pad_token_id)
    return Renderer(tokenizer, contract_for(tokenizer, network.config, format="chat"))


def sequence(renderer: Renderer, group: Any) -> list[int]:
    """The token ids of a group's only completion."""
    [ids] = renderer.sequences(group)
    assert isinstance(ids, list), ids
    return ids
