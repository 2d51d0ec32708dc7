"""What a chat template leaves out of a conversation: found by rendering one of the same shape.

A template writes nothing for a role that it does not know, for a second system message, for tools
and calls that it was not made for. The reward would be that of another conversation.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from reward_actor.groups import Message

Tool = Mapping[str, Any]


def shape(parts: Sequence[Mapping[str, Any]]) -> str:
    """Equal for conversations of which a template writes equal parts: the roles, the fields, and
    which of them are empty."""
    return json.dumps([_shape(part) for part in parts], sort_keys=True)


def _shape(value: Any, key: str = "") -> Any:
    if isinstance(value, str):
        return value if key in ("role", "type") else bool(value.strip())
    if isinstance(value, Mapping):
        return {str(name): _shape(item, str(name)) for name, item in value.items()}
    if isinstance(value, Sequence):
        return [_shape(item) for item in value]
    return value if value is None or isinstance(value, bool) else type(value).__name__


def lost(
    messages: Sequence[Message],
    tools: Sequence[Tool],
    render: Callable[[list[Message], list[Tool]], str],
) -> str | None:
    """The first part of a conversation that `render` leaves out, in words, or None.

    Looked for are contents (a tool's result is one), the names of tools, the names and arguments of
    calls. Not reasoning, which templates leave out of earlier turns on purpose, nor the rest of a
    tool, of which many write a part.
    """
    sentinels = _Sentinels()
    marked = [_marked(message, i, sentinels) for i, message in enumerate(messages)]
    described = [_renamed(tool, sentinels, f"tool {i}") for i, tool in enumerate(tools)]
    text = render(marked, described)
    return next((what for name, what in sentinels.parts.items() if name not in text), None)


class _Sentinels:
    """Texts that stand for the parts of a conversation, which `parts` has in words."""

    def __init__(self) -> None:
        self.parts: dict[str, str] = {}

    def of(self, what: str) -> str:
        name = f"turnsentinel{len(self.parts)}x"  # plain letters: trimmed and escaped by nobody
        self.parts[name] = what
        return name


def _marked(message: Message, number: int, sentinels: _Sentinels) -> Message:
    """The message with sentinels for its content and for what its calls say."""
    whose = f"message {number} (role {message.get('role')!r})"
    marked = dict(message)
    content = message.get("content")
    if isinstance(content, str) and content.strip():
        marked["content"] = sentinels.of(f"the content of {whose}")
    calls = message.get("tool_calls")
    if isinstance(calls, list):
        marked["tool_calls"] = [
            _renamed(call, sentinels, f"tool call {i} of {whose}") for i, call in enumerate(calls)
        ]
    return marked


def _renamed(value: Any, sentinels: _Sentinels, what: str) -> Any:
    """A tool or a call, {"function": {"name", ...}} or the inner part alone, of another name and
    with other values of its arguments."""
    if not isinstance(value, Mapping):
        return value
    inner = value.get("function")
    if isinstance(inner, Mapping):
        return {**value, "function": _renamed(inner, sentinels, what)}
    renamed = dict(value)
    if "name" in value:
        renamed["name"] = sentinels.of(what)
    arguments = value.get("arguments")
    if isinstance(arguments, Mapping) and arguments:
        renamed["arguments"] = dict.fromkeys(arguments, sentinels.of(f"the arguments of {what}"))
    elif isinstance(arguments, str) and arguments.strip():
        renamed["arguments"] = sentinels.of(f"the arguments of {what}")
    return renamed
