"""Conversations as their senders write them, in the one form that is rendered.

Training, files, the service and adapters read messages, tools and template arguments by this, so
that what was trained is what is scored. Every error is a ValueError that names the place
(`prompt.1.tool_calls`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from reward_actor.groups import Message

FIELDS = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content")
"""What chat templates read of a message."""


def messages(value: object, place: str) -> list[Message]:
    """Messages with nothing but what chat templates read, and contents that are text.

    The parts of a content are joined by newlines, as vLLM joins them. A null content is an empty
    one where the message calls a tool.
    """
    if not _is_list(value):
        raise ValueError(f"{place} is {kind_of(value)}, not a list of messages")
    if not value:
        raise ValueError(f"{place} is empty")
    return [_message(item, f"{place}.{number}") for number, item in enumerate(value)]


def _message(value: Any, place: str) -> Message:
    if not isinstance(value, Mapping):
        raise ValueError(f"{place} is {kind_of(value)}, not a message {{role, content}}")
    known = {name: value[name] for name in FIELDS if value.get(name) is not None}
    for name in ("role", "name", "tool_call_id", "reasoning_content"):
        if not isinstance(known.get(name, "" if name != "role" else None), str):
            raise ValueError(f"{place}.{name} is {kind_of(known.get(name))}, not text")
    calls = known.pop("tool_calls", None)
    if calls is not None and not _are_objects(calls):
        raise ValueError(f"{place}.tool_calls is not a list of calls")
    known["content"] = _content(known.get("content"), f"{place}.content", can_be_null=bool(calls))
    if calls:
        known["tool_calls"] = list(calls)
    return dict(without_nulls(known))


def _content(value: Any, place: str, *, can_be_null: bool) -> str:
    if isinstance(value, str):
        return value
    if value is None and can_be_null:
        return ""
    if _is_list(value):
        return joined(value, place)
    more = ", and the message calls no tool" if value is None else ""
    raise ValueError(f"{place} is {kind_of(value)}, not text{more}")


def joined(parts: Sequence[Any], place: str = "content") -> str:
    """The text of a content in parts, {"type": "text", "text": ...}."""
    texts = []
    for number, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, Mapping) else kind_of(part)
        text = part.get("text") if isinstance(part, Mapping) and kind == "text" else None
        if not isinstance(text, str):
            raise ValueError(f"{place}.{number} is of type {kind!r}; a reward model reads text")
        texts.append(text)
    return "\n".join(texts)


def tools(value: object, place: str) -> tuple[dict[str, Any], ...]:
    """Tool definitions: a list of objects, or that as JSON, in which tables keep it."""
    value = _from_json(value) or ()
    if not _are_objects(value):
        raise ValueError(f"{place} is not a list of tool definitions")
    return tuple(without_nulls(tool) for tool in value)


def template_args(value: object, place: str) -> dict[str, Any]:
    """What else the chat template is told: an object, or that as JSON."""
    value = _from_json(value) or {}
    if not isinstance(value, Mapping):
        raise ValueError(f"{place} is {kind_of(value)}, not an object")
    return dict(without_nulls(value))


def messages_in(text: str) -> list[Any] | None:
    """The messages that a column of a table holds as JSON; None for every other text. Not for what
    comes over the network: there a prompt is what somebody typed."""
    if text.lstrip()[:1] != "[":
        return None
    value = _from_json(text)
    is_one = _are_objects(value) and value and all("role" in item for item in value)
    return list(value) if is_one else None


def _from_json(value: Any) -> Any:
    """What a text says as JSON; itself where it is no JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def without_nulls(value: Any) -> Any:
    """A JSON value without its nulls: a table has one for each key that another row has."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if _is_list(value) else value


def kind_of(value: object) -> str:
    """What a JSON value is, for messages."""
    return {"NoneType": "null", "dict": "an object", "list": "a list", "str": "text"}.get(
        type(value).__name__, type(value).__name__
    )


def _is_list(value: object) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _are_objects(value: Any) -> bool:
    return _is_list(value) and all(isinstance(item, Mapping) for item in value)
