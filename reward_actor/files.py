"""Rows of JSONL in and out, for `rayward score` and `rayward rollout`, and whole files."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from reward_actor import conversation
from reward_actor.groups import Group, GroupScores, Prompt

if TYPE_CHECKING:
    from reward_actor.rollout.records import RolloutGroup

Row = dict[str, Any]


def read_rows(path: str | Path) -> Iterator[tuple[str, Row]]:
    """(place, row) of a .jsonl or .jsonl.gz file; place is "FILE:LINE", for messages.

    Raises ValueError for a missing, empty or damaged file, or a line that is not a JSON object.
    """
    file_path = Path(path)
    if not file_path.is_file():
        raise ValueError(f"{file_path} is not a file")
    num_rows = 0
    for place, line in _lines(file_path):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig"))  # a mark that some tools write first
        except (ValueError, RecursionError) as error:  # JSON that is nested too deeply
            if not num_rows and begins_an_array(line):
                raise ValueError(f"{file_path} {IS_AN_ARRAY}") from error
            raise ValueError(f"{place}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise ValueError(f"{place}: a {type(row).__name__}, not a JSON object")
        num_rows += 1
        yield place, row
    if not num_rows:
        raise ValueError(f"{file_path} holds no rows")


IS_AN_ARRAY = "is one JSON array over many lines; write each of its objects on a line of its own"


def begins_an_array(line: bytes) -> bool:
    """Whether a file's first line begins a list of all rows that goes on in the next one."""
    text = line.decode("utf-8-sig", errors="replace").strip()
    return text[:1] == "[" and text[1:].lstrip()[:1] in ("", "{") and text[-1:] != "]"


def _lines(path: Path) -> Iterator[tuple[str, bytes]]:
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                yield f"{path}:{number}", line
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}:{number + 1}: cannot be read: {error}") from error


def write_rows(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as JSONL, whole or not at all."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    opener = gzip.open if target.suffix == ".gz" else open
    with opener(partial, "wt", encoding="utf-8") as file:
        for row in rows:
            file.write(_to_line(row) + "\n")
    partial.replace(target)


def _to_line(row: Mapping[str, Any]) -> str:
    line = json.dumps(row, ensure_ascii=False)
    try:
        line.encode("utf-8")
    except UnicodeEncodeError:  # a lone surrogate: legal in JSON, but only as an escape
        return json.dumps(row)
    return line


def prompt_of(row: Row, place: str) -> Prompt:
    """The row's prompt: text, or chat messages, or those as JSON. Raises ValueError naming the
    place."""
    prompt = row.get("prompt")
    if isinstance(prompt, str):
        prompt = conversation.messages_in(prompt) or prompt
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
    """The row's group: `prompt` with `completions` (or one `completion`, or the texts `chosen` and
    `rejected`, which may be without a prompt), each a text or an assistant's message, `tools` and
    `chat_template_kwargs` where the row has them; or token ids.

    Under "chat" a dialogue in text is messages (`conversation.dialogue`). Raises ValueError naming
    the place.
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
    completions, is_pair = _completions(row)
    if not isinstance(completions, list) or not all(
        isinstance(given, str if is_pair else str | dict) for given in completions
    ):
        raise ValueError(
            f"{place}: needs completions: a list of texts or messages (or one completion, or "
            "chosen and rejected as text)"
        )
    said = [
        conversation.completion(given, f"{place}: completions.{number}")
        for number, given in enumerate(completions)
    ]
    is_whole = is_pair and row.get("prompt") is None
    question = question_of({**row, "prompt": ""} if is_whole else row, place)
    group = replace(question, completions=said)
    return _in_messages(group, place, is_whole) if format == "chat" else group


def _completions(row: Row) -> tuple[Any, bool]:
    """What the row has for completions, and whether they are a pair's sides."""
    if "completions" in row:
        return row["completions"], False
    if "completion" in row:
        return [row["completion"]], False
    return [row.get("chosen"), row.get("rejected")], True


def _in_messages(group: Group, place: str, is_whole: bool) -> Group:
    """The group with messages where its text is a dialogue; where it `is_whole`, it must be one."""
    prompt = group.prompt
    if not isinstance(prompt, str):
        return group
    try:
        read = [conversation.from_dialogue(prompt, text) for text in group.completions]
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
    found = [one for one in read if one is not None]
    if not found and not is_whole:
        return group
    if len(found) < len(read):
        raise ValueError(f"{place}: {conversation.NO_DIALOGUE}")
    asked = found[0][0]
    if any(messages != asked for messages, _ in found):
        raise ValueError(
            f"{place}: its dialogues have different prompts; give each a row of its own"
        )
    return replace(group, prompt=asked, completions=[text for _, text in found])


def scored_row(row: Row, scores: GroupScores) -> Row:
    """The row with its scores beside what was in it."""
    return {**row, **_scores(scores)}


def rollout_row(rollout: RolloutGroup) -> Row:
    row = {name: value for name, value in vars(rollout).items() if name != "scores"}
    told = {"tools": row.pop("tools"), "chat_template_kwargs": row.pop("template_args")}
    row |= {name: value for name, value in told.items() if value}
    if row["error"] is None:
        del row["error"]
    return row if rollout.scores is None else {**row, **_scores(rollout.scores)}


def _scores(scores: GroupScores) -> Row:
    ensemble = (
        {} if scores.members is None else {"members": scores.members, "spread": scores.spread}
    )
    return {
        "rewards": scores.rewards,
        "raw_scores": scores.raw_scores,
        **ensemble,
        "num_tokens": scores.num_tokens,
        "errors": [None if error is None else asdict(error) for error in scores.errors],
        "model_version": scores.model_version,
    }


def _is_ids(value: object) -> bool:
    return isinstance(value, list) and all(type(token) is int for token in value)


def replace_text(path: Path, text: str) -> None:
    """Write a file that is never seen half-written."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
