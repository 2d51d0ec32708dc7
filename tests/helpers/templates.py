"""Chat templates of other systems, and renderers of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from reward_actor.model.inferred import contract_for
from reward_actor.render import Renderer

THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}"
)


LLAMA_LIKE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}"
    "{% if m.role == 'assistant' %}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


NO_END_TOKEN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def renderer(tokenizer: Any, base_model: Path, template: str | None, **changes: Any) -> Renderer:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(base_model)
    previous = tokenizer.chat_template
    try:
        tokenizer.chat_template = template or previous
        contract = contract_for(tokenizer, config, format=changes.pop("format", "chat"), **changes)
    finally:
        tokenizer.chat_template = previous
    return Renderer(tokenizer, contract)


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40).filter(
    lambda text: "<|" not in text
)
