"""Chat messages as other systems send them: with fields of their own, and content in parts."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from reward_actor.groups import Message
from reward_actor.schema import Content, Role


class LenientMessage(BaseModel):
    """One chat turn, with whatever its sender's system puts into it; of that is rendered what
    training renders."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    role: Role
    content: Content = None


def as_messages(messages: Sequence[LenientMessage]) -> list[Message]:
    """As they are rendered; `reasoning` is what vLLM calls `reasoning_content`."""
    found = [message.model_dump(exclude_none=True) for message in messages]
    return [
        {"reasoning_content": fields["reasoning"], **fields} if "reasoning" in fields else fields
        for fields in found
    ]
