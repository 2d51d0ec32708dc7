"""Rows in and out, for `rayward score` and `rayward rollout`."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from datetime import date, time, timedelta
from decimal import Decimal
from itertools import chain
from pathlib import Path
from typing import Any, Literal
from uuid import UUID

from reward_actor import conversation, dialogues
from reward_actor.atomic import replacing
from reward_actor.groups import Completion, Group, GroupScores, Prompt
from reward_actor.json_files import json_lines
from reward_actor.sources import files_of, is_file_name, raw_rows

Row = dict[str, Any]


def read_rows(source: str | Path) -> Iterator[tuple[str, Row]]:
    """(place, row) of a data set as `reward_actor.sources` has them, any other file being JSON
    lines; place is "FILE:LINE" or "NAME: row N", for messages. Dates, times and decimals are text.

    Raises ValueError for a missing, empty or damaged file, a line that is not a JSON object, or a
    column that JSON cannot hold.
    """
    name = str(source)
    files = files_of(name) or ([Path(name)] if is_file_name(name) else [])
    place = None
    for place, row in chain.from_iterable(map(_rows, files)) if files else _numbered(name):
        if not isinstance(row, dict):
            raise ValueError(f"{place}: a {type(row).__name__}, not a JSON object")
        yield place, row
    if place is None:
        raise ValueError(f"{source} holds no rows")


def _rows(file: Path) -> Iterator[tuple[str, Any]]:
    if not file.is_file():
        raise ValueError(f"{file} is not a file")
    return _numbered(str(file)) if file.suffix == ".parquet" else json_lines(file)


def _numbered(source: str) -> Iterator[tuple[str, Any]]:
    for number, row in raw_rows(source):
        place = f"{source}: row {number}"
        yield place, _as_json(row, place) if isinstance(row, dict) else row


def _as_json(row: Row, place: str) -> Row:
    found: Row = {}
    for name, value in row.items():
        try:
            found[name] = json.loads(json.dumps(value, default=_text_of))
        except TypeError as error:
            raise ValueError(f"{place}: {name!r} has {error}; convert or remove it") from error
    return found


def _text_of(value: object) -> str:
    if isinstance(value, date | time):  # a datetime is a date
        return value.isoformat()
    if isinstance(value, Decimal | timedelta | UUID):
        return str(value)
    raise TypeError(f"values of type {type(value).__name__}, which JSON cannot hold")


def write_rows(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as JSONL, whole or not at all."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with (
        replacing(target) as file,
        gzip.open(file, "wb") if target.suffix == ".gz" else nullcontext(file) as lines,
    ):
        for row in rows:
            lines.write(line_of(row))


def line_of(row: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(row, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # a lone surrogate: legal in JSON, but only as an escape
        return json.dumps(row).encode() + b"\n"


def prompt_of(row: Row, place: str) -> Prompt:
    """The row's prompt: text, or chat messages, or those as JSON. Raises ValueError naming the
    place."""
    prompt = row.get("prompt")
    if isinstance(prompt, str):
        prompt = dialogues.messages_in(prompt) or prompt
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, list) or not prompt:
        raise ValueError(f"{place}: needs a prompt: text, or a list of {{role, content}} messages")
    return conversation.messages(prompt, f"{place}: prompt")


def question_of(row: Row, place: str) -> Group:
    """The row's prompt, with `tools` and `chat_template_kwargs` where it has them; no completions.

    Raises ValueError naming the place.
    """
    return Group(
        prompt_of(row, place),
        template_args=conversation.template_args(
            row.get("chat_template_kwargs"), f"{place}: chat_template_kwargs"
        ),
        tools=conversation.tools(row.get("tools"), f"{place}: tools"),
    )


def group_of(row: Row, place: str, format: Literal["chat", "text"] = "text") -> Group:
    """The row's group: `prompt` with `completions` (or one `completion`, or `chosen` and
    `rejected`, which may be without a prompt), each as `dialogues.answer` reads it, `tools` and
    `chat_template_kwargs` where the row has them; or token ids.

    Under "chat" a dialogue in text is messages (`dialogues.dialogue`). Raises ValueError naming the
    place.
    """
    if "prompt_ids" in row and "prompt" not in row:
        prompt_ids, completion_ids = row["prompt_ids"], row.get("completion_ids")
        if not _is_ids(prompt_ids) or not isinstance(completion_ids, list):
            raise ValueError(
                f"{place}: needs prompt_ids [id, ..] and completion_ids [[id, ..], ..]"
            )
        if not all(_is_ids(ids) for ids in completion_ids):
            raise ValueError(f"{place}: completion_ids must be lists of token ids")
        return Group(prompt_ids=prompt_ids, completion_ids=completion_ids)
    given, is_pair = _completions(row)
    if given is None:
        raise ValueError(
            f"{place}: needs completions: a list of texts or messages (or one completion, or "
            "chosen and rejected)"
        )
    is_whole = is_pair and row.get("prompt") is None
    question = question_of({**row, "prompt": ""} if is_whole else row, place)
    answers = [
        _answer(question, value, f"{place}: {name}", format, is_whole)
        for name, value in given.items()
    ]
    asked = [prompt for prompt, _ in answers]
    if not all(isinstance(prompt, str) for prompt in asked):
        asked = [conversation.as_messages(prompt) for prompt in asked]
    if any(prompt != asked[0] for prompt in asked):
        raise ValueError(
            f"{place}: its completions answer different prompts; give each a row of its own, with "
            "its prompt and one completion"
        )
    prompt = asked[0] if asked else question.prompt
    return replace(question, prompt=prompt, completions=[said for _, said in answers])


def _completions(row: Row) -> tuple[dict[str, Any] | None, bool]:
    """The row's completions by what they are called, and whether they are a pair's sides."""
    if "completions" in row:
        several = row["completions"]
        is_list = isinstance(several, list)
        return {f"completions.{i}": v for i, v in enumerate(several)} if is_list else None, False
    if "completion" in row:
        return {"completion": row["completion"]}, False
    sides = {name: row[name] for name in ("chosen", "rejected") if row.get(name) is not None}
    return (sides if len(sides) == 2 else None), True


def _answer(
    question: Group, given: Any, place: str, format: Literal["chat", "text"], is_whole: bool
) -> tuple[Prompt, Completion]:
    """A completion with what it answers; is_whole: a text must be a dialogue."""
    prompt = question.prompt
    assert prompt is not None
    own = prompt if isinstance(prompt, str) else list(prompt)
    asked, said = dialogues.answer(own, given, place)
    if format == "text" or not isinstance(asked, str):
        return asked, said
    try:
        read = dialogues.from_dialogue(asked, said)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
    if read is None and is_whole:
        raise ValueError(f"{place}: {dialogues.NO_DIALOGUE}")
    return read or (asked, said)


def scored_row(row: Row, scores: GroupScores) -> Row:
    """The row and its scores."""
    return {**row, **score_columns(scores)}


def score_columns(scores: GroupScores) -> Row:
    """A group's scores by the names that rows have them under."""
    return {name: value for name, value in scores.to_json().items() if value is not None}


def _is_ids(value: object) -> bool:
    return isinstance(value, list) and all(type(token) is int for token in value)
