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


def as_prompt(messages: Sequence[LenientMessage]) -> list[Message]:
    return [message.model_dump(exclude_none=True) for message in messages]
