"""Prompts and completions of a row, checked: text or chat messages."""

from __future__ import annotations

from typing import Any

from reward_actor.groups import Message
from trainer.rows import Side

# What chat templates read of a message.
_MESSAGE_KEYS = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content")


def parse_side(prompt: str | list[Message], value: Any, column: str) -> Side:
    """A completion as text, or as messages that may repeat the prompt, of the named column.

    Raises ValueError.
    """
    if isinstance(value, str):
        if not value.strip():
            raise ValueError(f"{column!r} is empty")
        return Side(prompt, value)
    if not isinstance(value, list):
        raise ValueError(f"{column!r} is {kind_of(value)}, not text or messages")
    *context, last = parse_messages(value, column)
    if last["role"] != "assistant":
        raise ValueError(f"the last message of {column!r} is of {last['role']!r}, not 'assistant'")
    if last.get("tool_calls"):
        raise ValueError(f"the last message of {column!r} calls a tool; only text has a reward")
    if not last["content"].strip():
        raise ValueError(f"the last message of {column!r} is empty")
    if prompt:
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        context = _joined(prompt, context, column)
    if not context:
        raise ValueError(f"{column!r} is a lone completion and the row has no prompt")
    return Side(context, last["content"])


def _joined(prompt: list[Message], context: list[Message], column: str) -> list[Message]:
    """The messages before a completion: the prompt, which `context` may repeat or continue.

    Either may have a system message that the other one lacks. Raises ValueError for a context that
    does neither: put behind the prompt it would be a conversation that nobody had.
    """
    has_system = bool(context) and context[0]["role"] == "system"
    if _begins(context, prompt) or (has_system and _begins(context[1:], prompt)):
        return context
    if prompt[0]["role"] == "system" and not has_system and _begins(context, prompt[1:]):
        return [prompt[0], *context]
    if not context or context[0]["role"] in ("assistant", "tool"):
        return [*prompt, *context]
    raise ValueError(
        f"{column!r} neither begins with the prompt nor continues it: give its messages with the "
        "whole prompt, or from the assistant's first turn after it"
    )


def _begins(messages: list[Message], prompt: list[Message]) -> bool:
    """Whether they begin with the prompt's, but for whitespace around a content."""

    def said(message: Message) -> tuple[Any, ...]:
        return message["role"], message["content"].strip(), message.get("tool_calls")

    return list(map(said, messages[: len(prompt)])) == list(map(said, prompt))


def parse_messages(value: list[Any], column: str) -> list[Message]:
    """Messages with nothing but what chat templates read. Raises ValueError."""
    if not value:
        raise ValueError(f"{column!r} is empty")
    messages: list[Message] = []
    for message in value:
        # A turn that calls tools may say nothing besides.
        said = isinstance(message, dict) and (
            "" if message.get("tool_calls") and message.get("content") is None
            else message.get("content")
        )  # fmt: skip
        if not isinstance(said, str) or not isinstance(message.get("role"), str):
            raise ValueError(f"{column!r} must hold messages {{'role': text, 'content': text}}")
        known = {key: message[key] for key in _MESSAGE_KEYS if message.get(key) is not None}
        messages.append(without_nulls({**known, "content": said}))
    return messages


def without_nulls(value: Any) -> Any:
    """A JSON value without its nulls: a table has one for each key that another row has."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def kind_of(value: Any) -> str:
    """What a JSON value is, for messages."""
    return {"NoneType": "null", "dict": "an object", "list": "a list", "str": "text"}.get(
        type(value).__name__, type(value).__name__
    )
