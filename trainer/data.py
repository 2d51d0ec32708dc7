"""Preference rows from files and the Hugging Face hub: read, checked, one form for all of them."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from os.path import commonprefix
from pathlib import Path
from typing import Any

from reward_actor.groups import Message, Prompt
from trainer.config import DataConfig

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
_SHOWN = 3
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.\[\]%:+-]+)?")
# How whole dialogues are written as text (Anthropic's hh-rlhf).
_FIRST_TURN = re.compile(r"\s*Human:(.*?)(?:\n\nAssistant:|\Z)", re.DOTALL)


@dataclass(frozen=True)
class Side:
    """One side of a pair; the completion is what the reward is for."""

    prompt: Prompt
    completion: str


@dataclass(frozen=True)
class Row:
    """A preference: `number` is its line (from 1) in the file, `key` what it is a preference about.

    `is_dialogue`: the two sides are whole dialogues in text, with the empty prompt.
    """

    number: int
    chosen: Side
    rejected: Side
    margin: float
    key: str
    is_dialogue: bool


class BadRows:
    """Collects what is wrong with which row, to be told at once: `count` of them, three shown."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.count = 0
        self._shown: list[str] = []

    def add(self, number: int, why: str) -> None:
        self.count += 1
        if self.count <= _SHOWN:
            self._shown.append(f"{self.source}:{number}: {why}")

    def check(self, num_rows: int) -> None:
        """Raise ValueError if there were any."""
        if self.count:
            more = f"\n  and {self.count - _SHOWN} more" if self.count > _SHOWN else ""
            raise ValueError(
                f"{self.count} of {num_rows} rows cannot be used:\n  "
                + "\n  ".join(self._shown)
                + more
            )


def read_rows(source: str, config: DataConfig, max_rows: int | None = None) -> list[Row]:
    """The rows of a file or of a hub data set. Relative paths start at the working directory.

    A row is {prompt, chosen, rejected}, each text or a list of messages (chosen and rejected may
    repeat the prompt), or whole dialogues {chosen, rejected}; a margin is optional. Raises
    ValueError for a source that cannot be read, one without rows, and rows without what is needed.
    """
    bad = BadRows(source)
    rows: list[Row] = []
    num_rows = 0
    for number, raw in _raw_rows(source):
        if num_rows == max_rows:
            break
        num_rows += 1
        try:
            rows.append(parse_row(number, json.loads(raw) if isinstance(raw, str) else raw, config))
        except json.JSONDecodeError as error:
            bad.add(number, f"not JSON: {error}")
        except ValueError as error:
            bad.add(number, str(error))
    bad.check(num_rows)
    if not rows:
        raise ValueError(f"{source} holds no rows")
    return rows


def parse_row(number: int, raw: Any, config: DataConfig) -> Row:
    """One row in the common form. Raises ValueError, saying what the row lacks."""
    if not isinstance(raw, dict):
        raise ValueError(f"a row must be an object, not {_kind(raw)}")
    for column in (config.chosen_column, config.rejected_column):
        if raw.get(column) is None:
            found = ", ".join(map(str, raw)) or "nothing"
            raise ValueError(f"no column {column!r} (the row has: {found})")
    prompt = raw.get(config.prompt_column)
    if isinstance(prompt, list):
        prompt = _messages(prompt, config.prompt_column)
    elif prompt is not None and not isinstance(prompt, str):
        raise ValueError(f"{config.prompt_column!r} is {_kind(prompt)}, not text or messages")
    sides = [
        _side(prompt or "", raw[column], column)
        for column in (config.chosen_column, config.rejected_column)
    ]
    margin = raw.get(config.margin_column)
    if isinstance(margin, bool) or not isinstance(margin, int | float | None):
        raise ValueError(f"{config.margin_column!r} is {_kind(margin)}, not a number")
    if margin is not None and not abs(margin) < float("inf"):
        raise ValueError(f"{config.margin_column!r} is {margin}, not a finite number")
    chosen, rejected = sides
    is_dialogue = chosen.prompt == "" or rejected.prompt == ""
    return Row(
        number, chosen, rejected, float(margin or 0.0), prompt_key(chosen, rejected), is_dialogue
    )


def prompt_key(chosen: Side, rejected: Side) -> str:
    """What must not stand on both sides of a held-out split: the first thing the human said.

    Two pairs from one conversation, cut at different turns, share it. Text that is not written as
    a dialogue and has no prompt is known by what both sides begin with.
    """
    if not isinstance(chosen.prompt, str):
        human = [m["content"] for m in chosen.prompt if m["role"] == "user"]
        return str(human[0] if human else chosen.prompt)
    text = chosen.prompt or chosen.completion
    turn = _FIRST_TURN.match(text)
    if turn:
        return turn[1].strip()
    if chosen.prompt:
        return chosen.prompt
    return commonprefix([text, rejected.completion]) or text  # noqa: RUF071 (of characters)


def _side(prompt: str | list[Message], value: Any, column: str) -> Side:
    if isinstance(value, str):
        if not value.strip():
            raise ValueError(f"{column!r} is empty")
        return Side(prompt, value)
    if not isinstance(value, list):
        raise ValueError(f"{column!r} is {_kind(value)}, not text or messages")
    *context, last = _messages(value, column)
    if last["role"] != "assistant":
        raise ValueError(f"the last message of {column!r} is of {last['role']!r}, not 'assistant'")
    if not last["content"].strip():
        raise ValueError(f"the last message of {column!r} is empty")
    before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if prompt and context[: len(before)] != before:
        context = [*before, *context]
    if not context:
        raise ValueError(f"{column!r} is a lone completion and the row has no prompt")
    return Side(context, last["content"])


def _messages(value: list[Any], column: str) -> list[Message]:
    if not value:
        raise ValueError(f"{column!r} is empty")
    for message in value:
        if not isinstance(message, dict) or not all(
            isinstance(message.get(key), str) for key in ("role", "content")
        ):
            raise ValueError(f"{column!r} must hold messages {{'role': text, 'content': text}}")
    return [{"role": message["role"], "content": message["content"]} for message in value]


def _kind(value: Any) -> str:
    return {"NoneType": "null", "dict": "an object", "list": "a list", "str": "text"}.get(
        type(value).__name__, type(value).__name__
    )


def is_file_name(source: str) -> bool:
    """Whether `source` means a file; otherwise it is a name on the hub."""
    return source.endswith(SUFFIXES) or Path(source).exists() or not _HUB_NAME.fullmatch(source)


def check_source(source: str, field: str) -> None:
    """Raise ValueError, without reading it, for a file that is missing or of an unknown type."""
    if not is_file_name(source):
        return
    path = Path(source).expanduser()
    if not path.is_file():
        what = "is a directory" if path.is_dir() else "does not exist"
        raise ValueError(f"{field}: {path.absolute()} {what}")
    if not path.name.endswith(SUFFIXES):
        raise ValueError(f"{field}: {path} must end in {', '.join(SUFFIXES)}")


def _raw_rows(source: str) -> Iterator[tuple[int, Any]]:
    if not is_file_name(source):
        yield from enumerate(_hub_rows(source), start=1)
        return
    check_source(source, "data")
    path = Path(source).expanduser()
    if path.suffix == ".parquet":
        yield from enumerate(_parquet_rows(path), start=1)
        return
    opener: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, line
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    from pyarrow import ArrowInvalid, parquet

    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                yield from batch.to_pylist()
    except (OSError, ArrowInvalid) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _hub_rows(name: str) -> Iterator[dict[str, Any]]:
    import datasets

    path, _, split = name.partition(":")
    try:
        yield from datasets.load_dataset(path, split=split or "train")
    except (OSError, ValueError) as error:  # hub errors (unknown, offline) are OSErrors
        raise ValueError(f"{name} cannot be loaded from the Hugging Face hub: {error}") from error
