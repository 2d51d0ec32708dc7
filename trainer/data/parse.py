"""What a row of a file says, checked: from JSON values to `trainer.data.rows.Row`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from reward_actor import conversation, dialogues
from reward_actor.conversation import kind_of
from reward_actor.groups import Completion, Message
from reward_actor.token_ids import common_prefix
from trainer.data.rows import Row, Side, prompt_key

if TYPE_CHECKING:
    from trainer.config.data import Columns

# TRL has had two names for the token ids of a side. Where it gives those of the prompt, too, a side
# is the completion alone.
_PROMPT_IDS = ("prompt_ids", "prompt_input_ids")
_CHOSEN_IDS = ("chosen_ids", "chosen_input_ids")
_REJECTED_IDS = ("rejected_ids", "rejected_input_ids")
_MAX_ID = 2**31 - 1  # of int32, which token ids are kept in
_MAX_FLOAT32 = 3.4e38  # of float32, which scores, margins and attributes are kept in


def parse_line(number: int, raw: Any, columns: Columns) -> Row:
    """`parse_row` of what `reward_actor.sources` has read. Raises ValueError."""
    try:
        return parse_row(number, parse_object(raw), columns)
    except RecursionError:  # in what takes the nulls out of tool definitions
        raise ValueError("nested too deeply") from None


def parse_object(raw: Any) -> dict[str, Any]:
    """A line of JSON, or a row that is parsed already, as an object. Raises ValueError."""
    try:
        if isinstance(raw, bytes):
            raw = raw.decode("utf-8")
        if isinstance(raw, str):
            raw = json.loads(raw)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error.reason} at byte {error.start + 1}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"a row must be an object, not {kind_of(raw)}")
    return raw


def parse_row(number: int, raw: Mapping[str, Any], columns: Columns) -> Row:
    """One row in the common form; its columns tell its kind, the first that fits of these.

    Token ids, scored as given (the names are fixed; TRL's `prompt_input_ids` and so on do, too):
        {"prompt_ids": [5, 9], "chosen_ids": [7, 2], "rejected_ids": [8, 2]}
        {"chosen_ids": [5, 9, 7, 2], "rejected_ids": [5, 9, 8, 2]}
        {"prompt_ids": [5, 9], "completions_ids": [[7, 2], [8, 2], [4, 2]], "scores": [3, 1, 2]}
    A pair, as completions of a prompt or as two dialogues, in text or messages; or a tie:
        {"prompt": "Name a fruit.", "chosen": "An apple.", "rejected": "A pan.", "margin": 0.5}
        {"chosen": [{"role": "user", "content": "Name a fruit."},
                    {"role": "assistant", "content": "An apple."}], "rejected": [...]}
        {"chosen": "\\n\\nHuman: Name a fruit.\\n\\nAssistant: An apple.", "rejected": "..."}
        {"prompt": "Name a fruit.", "chosen": "An apple.", "rejected": "A pear.", "tie": true}
    A ranking, with scores or, unless columns name a column of them, best first:
        {"prompt": "Name a fruit.", "completions": ["A pan.", "An apple."], "scores": [1, 8.5]}
    A completion with attributes, null where unknown:
        {"prompt": "Name a fruit.", "completion": "An apple.", "attributes": {"helpful": 4}}

    A pair or a ranking may have `attributes`, too: a list, one for each completion in the order of
    the row (chosen first). All may have `subset`, and text `tools` and `chat_template_kwargs`.
    Raises ValueError, saying what the row lacks.
    """
    prompt_ids = _prompt_ids(raw)
    ids = _sequences(raw, prompt_ids)
    sides: tuple[Side, ...] = ()
    is_pair = _has(raw, (*_CHOSEN_IDS, *_REJECTED_IDS))
    is_single = False
    if not ids:
        is_pair = _has(raw, (columns.chosen_column, columns.rejected_column))
        is_single = not is_pair and not _has(raw, (columns.completions_column,))
        sides = _sides(raw, columns, is_pair, is_single)
    num = len(ids or sides)
    is_tie = _flag(raw, columns.tie_column)
    if is_tie and not is_pair:
        raise ValueError(f"{columns.tie_column!r} is for pairs; give a ranking equal scores")
    scores: tuple[float, ...] = (0.0, 0.0) if is_tie else (1.0, 0.0)
    if not is_pair:
        scores = (0.0,) if is_single else _scores(raw, columns, num)
    attributes = _attributes(raw, columns.attributes_column, num, is_single)
    order = sorted(range(num), key=lambda i: -scores[i])  # stable
    sides = tuple(sides[i] for i in order if sides)
    ids = tuple(ids[i] for i in order if ids)
    key, has_prompt = _ids_key(prompt_ids, ids) if ids else prompt_key(sides)
    return Row(
        number=number,
        sides=sides,
        ids=ids,
        scores=tuple(scores[i] for i in order),
        key=key,
        has_prompt=has_prompt,
        margin=_margin(raw, columns.margin_column, is_pair, is_tie),
        attributes=tuple(attributes[i] for i in order if attributes),
        subset=_subset(raw, columns.subset_column),
        tools=conversation.tools(raw.get(columns.tools_column), repr(columns.tools_column)),
        template_args=conversation.template_args(
            raw.get(columns.template_args_column), repr(columns.template_args_column)
        ),
        is_dialogue=any(side.prompt == "" for side in sides),
        has_scores=num == 1 or is_pair or raw.get(columns.scores_column) is not None,
    )


def _has(raw: Mapping[str, Any], names: Sequence[str]) -> bool:
    return any(raw.get(name) is not None for name in names)


def _required(raw: Mapping[str, Any], *names: str) -> tuple[str, Any]:
    """The first of these columns that the row has. Raises ValueError, with the first name."""
    for name in names:
        if raw.get(name) is not None:
            return name, raw[name]
    found = ", ".join(map(str, raw)) or "nothing"
    raise ValueError(f"no column {names[0]!r} (the row has: {found})")


def _prompt_ids(raw: Mapping[str, Any]) -> list[int]:
    given = [(name, raw[name]) for name in _PROMPT_IDS if raw.get(name) is not None]
    return _ids(*given[0]) if given else []


def _sequences(raw: Mapping[str, Any], prompt: list[int]) -> tuple[list[int], ...]:
    if _has(raw, (*_CHOSEN_IDS, *_REJECTED_IDS)):
        given = [_required(raw, *_CHOSEN_IDS), _required(raw, *_REJECTED_IDS)]
    elif _has(raw, ("completions_ids",)):
        name, several = "completions_ids", raw["completions_ids"]
        if not isinstance(several, list):
            raise ValueError(f"{name!r} is {kind_of(several)}, not a list of lists of token ids")
        given = [(name, ids) for ids in several]
        if len(given) < 2:
            raise ValueError(f"{name!r} holds {len(given)} completions; a ranking needs two")
    else:
        return ()
    return tuple([*prompt, *_ids(name, ids)] for name, ids in given)


def _ids(name: str, value: Any) -> list[int]:
    if not isinstance(value, list) or not all(type(token) is int for token in value):
        raise ValueError(f"{name!r} must hold token ids")
    if value and not 0 <= min(value) <= max(value) <= _MAX_ID:
        wrong = min(value) if min(value) < 0 else max(value)
        raise ValueError(f"{name!r} holds {wrong}; a token id is from 0 to {_MAX_ID}")
    return value


def _ids_key(prompt: Sequence[int], ids: Sequence[list[int]]) -> tuple[str, bool]:
    """As `trainer.data.rows.prompt_key`."""
    begin = prompt or ids[0][: common_prefix(*ids)] or ids[0]
    return "token ids " + " ".join(map(str, begin)), bool(prompt)


def _sides(
    raw: Mapping[str, Any], columns: Columns, is_pair: bool, is_single: bool
) -> tuple[Side, ...]:
    prompt = raw.get(columns.prompt_column)
    if is_pair:
        given = [_required(raw, columns.chosen_column), _required(raw, columns.rejected_column)]
    elif is_single:
        if not _has(raw, (columns.completion_column,)):
            _required(raw, columns.chosen_column)
        given = [(columns.completion_column, raw[columns.completion_column])]
    else:
        name, several = _required(raw, columns.completions_column)
        if not isinstance(several, list):
            raise ValueError(f"{name!r} is {kind_of(several)}, not a list of completions")
        if len(several) < 2:
            raise ValueError(f"{name!r} holds {len(several)} completions; a ranking needs two")
        given = [(name, value) for value in several]
    if isinstance(prompt, str):
        prompt = dialogues.messages_in(prompt) or prompt
    if isinstance(prompt, list):
        if not prompt:
            raise ValueError(f"{columns.prompt_column!r} is empty")
        prompt = conversation.messages(prompt, repr(columns.prompt_column))
    elif prompt is not None and not isinstance(prompt, str):
        raise ValueError(f"{columns.prompt_column!r} is {kind_of(prompt)}, not text or messages")
    return tuple(parse_side(prompt or "", value, name) for name, value in given)


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name!r} is {kind_of(value)}, not a number")
    if not abs(value) < _MAX_FLOAT32:
        raise ValueError(f"{name!r} is {value}, not a finite number")
    return float(value)


def _scores(raw: Mapping[str, Any], columns: Columns, num: int) -> tuple[float, ...]:
    """Those of a ranking: larger is better. Two are a pair, of which only the order counts."""
    name = columns.scores_column
    value = raw.get(name)
    if value is None:
        if "scores_column" in columns.named:  # to take the order for scores would be a guess
            _required(raw, name)
        return tuple(float(i) for i in reversed(range(num)))
    if not isinstance(value, list):
        raise ValueError(f"{name!r} is {kind_of(value)}, not a list of numbers")
    if len(value) != num:
        raise ValueError(f"{name!r} holds {len(value)} numbers for {num} completions")
    scores = tuple(_number(name, score) for score in value)
    if num == 2:
        return (float(scores[0] > scores[1]), float(scores[1] > scores[0]))
    return scores


def _margin(raw: Mapping[str, Any], name: str, is_pair: bool, is_tie: bool) -> float:
    if raw.get(name) is None:
        return 0.0
    margin = _number(name, raw[name])
    if not is_pair:
        raise ValueError(f"{name!r} is for pairs of chosen and rejected")
    if is_tie and margin:
        raise ValueError(f"{name!r} is {margin:g}, but the pair is a tie")
    return margin


def _flag(raw: Mapping[str, Any], name: str) -> bool:
    value = raw.get(name)
    if value is None or isinstance(value, bool):
        return bool(value)
    raise ValueError(f"{name!r} is {kind_of(value)}, not true or false")


def _attributes(
    raw: Mapping[str, Any], name: str, num: int, is_single: bool
) -> list[dict[str, float]]:
    value = raw.get(name)
    if value is None:
        return []
    several = [value] if is_single else value
    if not isinstance(several, list) or not all(isinstance(one or {}, dict) for one in several):
        wanted = "an object" if is_single else "a list of objects"
        raise ValueError(f"{name!r} is not {wanted} {{name: number}}")
    if len(several) != num:
        raise ValueError(f"{name!r} holds {len(several)} objects for {num} completions")
    return [
        {key: _number(f"{name}.{key}", v) for key, v in (one or {}).items() if v is not None}
        for one in several
    ]


def _subset(raw: Mapping[str, Any], name: str) -> str:
    value = raw.get(name)
    if value is None or isinstance(value, str):
        return value or ""
    raise ValueError(f"{name!r} is {kind_of(value)}, not text")


def parse_side(prompt: str | list[Message], value: Any, column: str) -> Side:
    """A completion as text, as a message, or as messages that may repeat the prompt, of the named
    column. Raises ValueError.
    """
    if value in ("", []):
        raise ValueError(f"{column!r} is empty")
    asked, completion = dialogues.answer(prompt, value, repr(column))
    if _is_empty(completion):
        raise ValueError(f"{column!r} is empty: its last turn says nothing")
    return Side(asked, completion)


def _is_empty(completion: Completion) -> bool:
    if isinstance(completion, str):
        return not completion.strip()
    return not completion["content"].strip() and not completion.get("tool_calls")
