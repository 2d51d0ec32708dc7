"""Chat messages as other systems send them: with fields of their own, and content in parts."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from reward_actor.conversation import without_nulls
from reward_actor.groups import Message
from reward_actor.schema import Content, Role


class LenientMessage(BaseModel):
    """One chat turn; the chat template sees whatever else it holds, too."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    role: Role
    content: Content = None


def as_prompt(messages: Sequence[LenientMessage]) -> list[Message]:
    """A null content is an empty one: templates would write the word."""
    return [{**without_nulls(m.model_dump()), "content": m.content or ""} for m in messages]
