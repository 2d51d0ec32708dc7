"""What a chat template leaves out of a conversation: found by rendering one of the same shape.

A template writes nothing for a role that it does not know, for a second system message, for tool
calls that it was not made for. The reward would be that of another conversation.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from reward_actor.groups import Message


def shape(messages: Sequence[Mapping[str, Any]]) -> str:
    """Equal for conversations of which a template writes equal parts: the roles, the fields, and
    which of them are empty."""
    return json.dumps([_shape(message) for message in messages], sort_keys=True)


def _shape(value: Any, key: str = "") -> Any:
    if isinstance(value, str):
        return value if key in ("role", "type") else bool(value.strip())
    if isinstance(value, Mapping):
        return {str(name): _shape(item, str(name)) for name, item in value.items()}
    if isinstance(value, Sequence):
        return [_shape(item) for item in value]
    return value if value is None or isinstance(value, bool) else type(value).__name__


def lost(messages: Sequence[Message], render: Callable[[list[Message]], str]) -> str | None:
    """The first part of a conversation that `render` leaves out, in words, or None.

    Reasoning is not looked for: templates leave out that of earlier turns on purpose.
    """
    parts: dict[str, str] = {}
    marked = [_marked(message, i, parts) for i, message in enumerate(messages)]
    text = render(marked)
    return next((what for sentinel, what in parts.items() if sentinel not in text), None)


def _marked(message: Message, number: int, parts: dict[str, str]) -> Message:
    """The message with a sentinel for its content and the names of its calls."""
    whose = f"message {number} (role {message.get('role')!r})"

    def sentinel(what: str) -> str:
        name = f"turnsentinel{len(parts)}x"  # plain letters: trimmed and escaped by nobody
        parts[name] = what
        return name

    marked = dict(message)
    content = message.get("content")
    if isinstance(content, str) and content.strip():
        marked["content"] = sentinel(f"the content of {whose}")
    calls = message.get("tool_calls")
    if isinstance(calls, list):
        marked["tool_calls"] = [
            _marked_call(call, sentinel(f"tool call {i} of {whose}"))
            for i, call in enumerate(calls)
        ]
    return marked


def _marked_call(call: Any, sentinel: str) -> Any:
    """A call, {"function": {"name", "arguments"}} or the inner part alone, of another name."""
    if not isinstance(call, Mapping):
        return call
    inner = call.get("function")
    if isinstance(inner, Mapping):
        return {**call, "function": {**inner, "name": sentinel}}
    return {**call, "name": sentinel}
