"""Chat messages as other systems send them: with fields of their own, and content in parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from reward_actor.groups import Message


class TextPart(BaseModel):
    type: Literal["text"]
    text: str


def _joined(content: Any) -> Any:
    """Parts as one text, with a newline between them, as vLLM joins them."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        if not isinstance(text, str):
            raise ValueError('each part of a content must be {"type": "text", "text": ...}')
        texts.append(text)
    return "\n".join(texts)


Content = Annotated[
    str | None, BeforeValidator(_joined, json_schema_input_type=str | list[TextPart] | None)
]


class LenientMessage(BaseModel):
    """One chat turn; the chat template sees whatever else it holds, too."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: Content = None


def as_prompt(messages: Sequence[LenientMessage]) -> list[Message]:
    return [message.model_dump() for message in messages]
