"""Conversations as their senders write them, in the one form that is rendered.

Training, files, the service and adapters read messages, tools and template arguments by this, so
that what was trained is what is scored. Every error is a ValueError that names the place
(`prompt.1.tool_calls`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeGuard

from reward_actor.groups import Completion, Message

FIELDS = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content")
"""What chat templates read of a message."""

NO_DIALOGUE = (
    "a text without a prompt is no dialogue; begin it with '\\n\\nHuman:', give its prompt, or use "
    "a text contract (model.format text)"
)

_LONGEST_TYPE = 32
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}
_QUESTION = "\n\nHuman:"
_ANSWER = "\n\nAssistant:"
_TURN = re.compile(r"\n\n(Human|Assistant):")


def messages(value: object, place: str) -> list[Message]:
    """Messages with nothing but what chat templates read, and contents that are text.

    The parts of a content are joined by newlines, as vLLM joins them. A null content is an empty
    one where the message calls a tool. The `arguments` of a call that are JSON text, OpenAI's form,
    become the object that it says, as vLLM does before its chat templates see them.
    """
    value = _plain(value, place)
    if not isinstance(value, list):
        raise ValueError(f"{place} is {kind_of(value)}, not a list of messages")
    return [_message(item, f"{place}.{number}") for number, item in enumerate(value)]


def completion(value: object, place: str) -> Completion:
    """The turn that is scored: text, or an assistant's message, of which the text alone is left
    where it has nothing else."""
    if isinstance(value, str):
        return value
    return _scored(_message(_plain(value, place), place), place)


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
    if not _are_objects(known.get("tool_calls", [])):
        raise ValueError(f"{place}.tool_calls is not a list of calls")
    if not known.get("tool_calls"):
        known.pop("tool_calls", None)
    known = _with_arguments(known, lambda given: _decoded(given, f"{place}.tool_calls"))
    content = known.get("content")
    if content is None and "tool_calls" in known:
        content = ""
    if isinstance(content, list):
        content = joined(content, f"{place}.content")
    if not isinstance(content, str):
        more = ", and the message calls no tool" if content is None else ""
        raise ValueError(f"{place}.content is {kind_of(content)}, not text{more}")
    return {**known, "content": content}


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


def _decoded(arguments: Any, place: str) -> Any:
    """The object that a text says as JSON, nothing being an empty one. A text that says none stays:
    a policy sampled it. Nulls go, as from an object, since what was read is read again."""
    if not isinstance(arguments, str):
        return arguments
    said = _plain(_from_json(arguments or "{}"), place)
    return said if isinstance(said, dict) else arguments


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
    """Tool definitions: a list of objects, or that as JSON, in which tables keep it."""
    value = _plain(_from_json(value), place)
    if value is None:
        return ()
    if not _are_objects(value):
        raise ValueError(f"{place} is not a list of tool definitions")
    return tuple(value)


def template_args(value: object, place: str) -> dict[str, Any]:
    """What else the chat template is told: an object, or that as JSON."""
    value = _plain(_from_json(value), place)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"{place} is {kind_of(value)}, not an object")
    return value


def messages_in(text: str) -> list[Any] | None:
    """The messages that a column of a table holds as JSON; None for every other text. Not for what
    comes over the network: there a prompt is what somebody typed."""
    if text.lstrip()[:1] != "[":
        return None
    value = _from_json(text)
    is_one = _are_objects(value) and value and all("role" in item for item in value)
    return list(value) if is_one else None


def dialogue(text: str) -> list[Message] | None:
    """The turns of a text "\\n\\nHuman: ...\\n\\nAssistant: ...", as Anthropic's hh-rlhf has them,
    without white space around a content; None for every other text.

    A content that holds such a mark cannot be told from two turns. Not for what comes over the
    network: there a prompt is what somebody typed.
    """
    if not text.startswith(_QUESTION):
        return None
    parts = _TURN.split(text)[1:]
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": _SPEAKERS[who], "content": said.strip()} for who, said in pairs]


def from_dialogue(prompt: str, completion: Completion) -> tuple[list[Message], Completion] | None:
    """The messages and the completion of a dialogue in text: of a prompt that is one as far as the
    completion, which may repeat it, or of a completion that is all of one, without a prompt.

    None where it is other text. Raises ValueError for a dialogue whose last turn is Human's.
    """
    said = completion if isinstance(completion, str) else ""
    turns = dialogue(prompt or said)
    if turns is None:
        return None
    last = turns.pop()
    if last["role"] != "assistant":
        raise ValueError(
            f"the last turn of the dialogue is Human's; end it with {_ANSWER!r} and the completion"
        )
    if not prompt:
        return turns, last["content"]
    if not isinstance(completion, str):
        return turns, completion
    begun = prompt.rpartition(_ANSWER)[2]
    return turns, (begun + completion.removeprefix(prompt)).strip()


def _from_json(value: Any) -> Any:
    """What a text says as JSON; itself where it is no JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _plain(value: object, place: str) -> Any:
    try:
        return without_nulls(value)
    except RecursionError:
        raise ValueError(f"{place} is nested too deeply") from None


def without_nulls(value: Any) -> Any:
    """A JSON value without its nulls: a table has one for each key that another row has. Arrays,
    which a table's lists become, are lists."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [without_nulls(item) for item in value]
    return value


def kind_of(value: object) -> str:
    """What a JSON value is, for messages."""
    return {"NoneType": "null", "dict": "an object", "list": "a list", "str": "text"}.get(
        type(value).__name__, type(value).__name__
    )


def _are_objects(value: Any) -> TypeGuard[list[dict[str, Any]]]:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)
