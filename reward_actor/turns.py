"""What a chat template makes of a conversation's turns: found by rendering one of the same shape.

A template writes nothing for a role that it does not know, for a second system message, for tools
and calls that it was not made for. The reward would be that of another conversation. And only the
template knows where in its text a turn ends.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reward_actor.contract import ScoringContract
from reward_actor.groups import Message, SampleError

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


@dataclass(frozen=True)
class AssistantTurns:
    """Which of the end tokens that a template writes end the assistant's turns of a conversation.

    ends: by the number of each assistant message in the prompt, how many end tokens stand before
    its own. num_ends: those of the whole sample, whose last one ends the completion.
    """

    ends: Mapping[int, int]
    num_ends: int

    def places(
        self, ids: Sequence[int], end: int, contract: ScoringContract
    ) -> list[int] | SampleError:
        """Where in a sample's ids each assistant turn ends, the completion's last: at the token
        that would be pooled if the sample ended there. end: the id of the end token."""
        dropped = contract.drop_trailing_ids
        found = [place for place, token in enumerate(ids) if token == end]
        if end in dropped and not contract.end_text:
            found.append(len(ids))  # was there until the contract took it off
        if len(found) != self.num_ends:
            return untold(
                f"its tokens hold {len(found)} ends of turns, where its chat template writes "
                f"{self.num_ends}; does a message spell one?"
            )
        tail = list(ids[found[-1] + 1 :])
        places = []
        for number, which in self.ends.items():
            place = found[which] + len(tail)
            if list(ids[found[which] + 1 : place + 1]) != tail:
                return untold(
                    f"prompt.{number} does not end as a whole sequence does, which is where this "
                    "model is read"
                )
            while place > 0 and ids[place] in dropped:
                place -= 1
            places.append(place)
        return [*places, len(ids) - 1]


def assistant_turns(
    messages: Sequence[Message], render: Callable[[list[Message]], str], end: str
) -> AssistantTurns | SampleError:
    """Where the assistant's turns of a prompt and its completion end, which is the last message.

    render: messages to text, as it is scored; end: how a template writes the end of a turn.
    """
    sentinels = _Sentinels()
    owners: dict[str, int] = {}
    marked = []
    for number, message in enumerate(messages):
        marked.append(_marked(_saying_something(message), number, sentinels))
        owners |= dict.fromkeys(list(sentinels.parts)[len(owners) :], number)
    ends: dict[int, int] = {}  # by message, of the end that follows its last part
    num_ends, speaker = 0, None
    for found in re.finditer(rf"turnsentinel\d+x|{re.escape(end)}", render(marked)):
        if found[0] != end:
            speaker = owners.get(found[0])
            continue
        if speaker is not None:
            ends[speaker] = num_ends
        speaker = None
        num_ends += 1
    last = len(messages) - 1
    numbers = [i for i, m in enumerate(messages[:-1]) if m.get("role") == "assistant"]
    for number in (*numbers, last):
        if number not in ends:
            whose = "the completion" if number == last else f"prompt.{number}"
            return untold(f"the chat template does not end {whose} with {end!r}")
    return AssistantTurns({number: ends[number] for number in numbers}, num_ends)


def untold(why: str) -> SampleError:
    """Why nobody knows where a sample's turns end."""
    return SampleError("unrenderable", f"turn_rewards: {why}")


def _saying_something(message: Message) -> Message:
    """The message with something for a sentinel to take the place of."""
    is_marked = str(message.get("content") or "").strip() or message.get("tool_calls")
    return message if is_marked else {**message, "content": "x"}
