"""Conversations as data sets record them: as JSON in a text, as hh-rlhf's text, whole beside their
prompt. Trainings, evaluations and files to score read them by this.

Not for what comes over the network: there a prompt is what somebody typed.
"""

from __future__ import annotations

import re
from typing import Any

from reward_actor import conversation
from reward_actor.groups import Completion, Message

NO_DIALOGUE = (
    "a text without a prompt is no dialogue; begin it with '\\n\\nHuman:', give its prompt, or use "
    "a text contract (model.format text)"
)

_SPEAKERS = {"Human": "user", "Assistant": "assistant"}
_QUESTION = "\n\nHuman:"
_ANSWER = "\n\nAssistant:"
_TURN = re.compile(r"\n\n(Human|Assistant):")


def messages_in(text: str) -> list[Any] | None:
    """The messages that a column of a table holds as JSON; None for every other text."""
    if text.lstrip()[:1] != "[":
        return None
    value = conversation.from_json(text)
    is_one = conversation.are_objects(value) and value and all("role" in item for item in value)
    return list(value) if is_one else None


def answer(
    prompt: str | list[Message], value: Any, place: str
) -> tuple[str | list[Message], Completion]:
    """A prompt and its completion, which is recorded as text, as a message, or as messages (or JSON
    of them) that may repeat the prompt or go on from it. Raises ValueError."""
    if isinstance(value, str):
        value = messages_in(value) or value
    if isinstance(value, str):
        return prompt, value
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or not value:
        raise ValueError(f"{place} is {conversation.kind_of(value)}, not text or messages")
    context, completion = conversation.answered(value, place)
    if isinstance(prompt, str) and prompt:
        prompt, completion = from_dialogue(prompt, completion) or (
            conversation.as_messages(prompt),
            completion,
        )
    context = _joined(prompt, context, place) if prompt else context
    if not context:
        raise ValueError(f"{place} is a lone completion and the row has no prompt")
    return context, completion


def dialogue(text: str) -> list[Message] | None:
    """The turns of a text "\\n\\nHuman: ...\\n\\nAssistant: ...", as Anthropic's hh-rlhf has them,
    without white space around a content; None for every other text.

    A content that holds such a mark cannot be told from two turns.
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
    begun = prompt.rpartition(_ANSWER)[2]
    if not isinstance(completion, str):
        return turns, {**completion, "content": (begun + completion["content"]).strip()}
    return turns, (begun + completion.removeprefix(prompt)).strip()


def _joined(prompt: list[Message], context: list[Message], place: str) -> list[Message]:
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
        f"{place} neither begins with the prompt nor continues it: give its messages with the "
        "whole prompt, or from the assistant's first turn after it"
    )


def _begins(messages: list[Message], prompt: list[Message]) -> bool:
    """Whether they begin with the prompt's, but for whitespace around a content."""

    def said(message: Message) -> tuple[Any, ...]:
        return message["role"], message["content"].strip(), message.get("tool_calls")

    return list(map(said, messages[: len(prompt)])) == list(map(said, prompt))
