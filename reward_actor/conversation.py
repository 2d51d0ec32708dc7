"""Conversations as their senders write them, in the one form that is rendered.

Training, files, the service and adapters read messages, tools and template arguments by this, so
that what was trained is what is scored. Every error is a ValueError that names the place
(`prompt.1.tool_calls`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeGuard

from reward_actor.groups import Completion, Message, Prompt

FIELDS = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content")
"""What chat templates read of a message."""

_LONGEST_TYPE = 32


def messages(value: object, place: str) -> list[Message]:
    """Messages with nothing but what chat templates read, and contents that are text.

    The parts of a content are joined by newlines, as vLLM joins them. A null content is an empty
    one where the message calls a tool.
    """
    value = plain(value, place)
    if not isinstance(value, list):
        raise ValueError(f"{place} is {kind_of(value)}, not a list of messages")
    return [_message(item, f"{place}.{number}") for number, item in enumerate(value)]


def as_messages(prompt: Prompt) -> list[Message]:
    """A prompt as messages: a text is the user's."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def completion(value: object, place: str) -> Completion:
    """The turn that is scored: text, or an assistant's message, of which the text alone is left
    where it has nothing else."""
    if isinstance(value, str):
        return value
    return _scored(_message(plain(value, place), place), place)


def answered(value: object, place: str) -> tuple[list[Message], Completion]:
    """Messages that end with a completion: those before it, and it. Not of an empty list."""
    *earlier, last = messages(value, place)
    return earlier, _scored(last, f"the last message of {place}")


def _scored(message: Message, place: str) -> Completion:
    if message["role"] != "assistant":
        raise ValueError(
            f"{place} is of {message['role']!r}, not 'assistant', whose turn is scored"
        )
    return message if message.keys() - {"role", "content"} else str(message["content"])


def _message(value: Any, place: str) -> Message:
    if not isinstance(value, dict):
        raise ValueError(f"{place} is {kind_of(value)}, not a message {{role, content}}")
    known = {name: value[name] for name in FIELDS if name in value}
    for name in ("role", "name", "tool_call_id", "reasoning_content"):
        if not isinstance(known.get(name, None if name == "role" else ""), str):
            raise ValueError(f"{place}.{name} is {kind_of(known.get(name))}, not text")
    if not are_objects(known.get("tool_calls", [])):
        raise ValueError(f"{place}.tool_calls is not a list of calls")
    if not known.get("tool_calls"):
        known.pop("tool_calls", None)
    content = known.get("content")
    if content is None and "tool_calls" in known:
        content = ""
    if isinstance(content, list):
        content = joined(content, f"{place}.content")
    if not isinstance(content, str):
        more = ", and the message calls no tool" if content is None else ""
        raise ValueError(f"{place}.content is {kind_of(content)}, not text{more}")
    return {**known, "content": content}


def with_parsed_arguments(message: Message) -> dict[str, Any]:
    """The message with the object that the arguments of its calls say as JSON text, nothing being
    an empty one, as vLLM does it before its chat templates see them. A text that says none stays: a
    policy sampled it."""

    def parsed(given: Any) -> Any:
        said = from_json(given or "{}") if isinstance(given, str) else given
        return said if isinstance(said, dict) else given

    return _with_arguments(message, parsed)


def with_text_arguments(message: Message) -> dict[str, Any]:
    """The message with the arguments of its calls as JSON, for templates that take only text."""

    def encoded(given: Any) -> Any:
        return given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)

    return _with_arguments(message, encoded)


def _with_arguments(message: Message, change: Callable[[Any], Any]) -> dict[str, Any]:
    """The message with what `change` makes of the arguments of its calls, which are {"function":
    {"name", "arguments"}} or the inner part alone."""

    def changed(call: Any) -> Any:
        if isinstance(call.get("function"), dict):
            return {**call, "function": changed(call["function"])}
        return {**call, "arguments": change(call["arguments"])} if "arguments" in call else call

    if "tool_calls" not in message:
        return dict(message)
    return {**message, "tool_calls": [changed(call) for call in message["tool_calls"]]}


def joined(parts: Sequence[Any], place: str = "content") -> str:
    """The text of a content in parts, {"type": "text", "text": ...}."""
    texts = []
    for number, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if not isinstance(kind, str) or len(kind) > _LONGEST_TYPE:  # it may be anything's text
            raise ValueError(f'{place}.{number} is no part {{"type": "text", "text": ...}}')
        if kind != "text":
            raise ValueError(f"{place}.{number} is of type {kind!r}; a reward model reads text")
        if not isinstance(part.get("text"), str):
            raise ValueError(f"{place}.{number}.text is {kind_of(part.get('text'))}, not text")
        texts.append(part["text"])
    return "\n".join(texts)


def tools(value: object, place: str) -> tuple[dict[str, Any], ...]:
    """Tool definitions: a list of objects, or that as JSON."""
    value = plain(from_json(value) if isinstance(value, str) else value, place)
    if value is None:
        return ()
    if not are_objects(value):
        raise ValueError(f"{place} is not a list of tool definitions")
    return tuple(value)


def template_args(value: object, place: str) -> dict[str, Any]:
    """What else the chat template is told: an object, or that as JSON."""
    value = plain(from_json(value) if isinstance(value, str) else value, place)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"{place} is {kind_of(value)}, not an object")
    return value


def from_json(text: str) -> Any:
    """What a text says as JSON; itself where it is no JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def plain(value: object, place: str) -> Any:
    """A JSON value of plain lists and objects without its nulls: a table has one for each key that
    another row has, and its lists become arrays."""
    try:
        return _plain(value)
    except RecursionError:
        raise ValueError(f"{place} is nested too deeply") from None


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_plain(item) for item in value]
    return value


def kind_of(value: object) -> str:
    """What a JSON value is, for messages."""
    return {"NoneType": "null", "dict": "an object", "list": "a list", "str": "text"}.get(
        type(value).__name__, type(value).__name__
    )


def are_objects(value: Any) -> TypeGuard[list[dict[str, Any]]]:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)
