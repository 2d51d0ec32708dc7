"""Configuration errors in plain English: which key, what was wrong, which key was meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

Config = TypeVar("Config", bound=BaseModel)


def validate(
    model: type[Config],
    data: Mapping[str, Any],
    source: str = "",
    options: Mapping[str, str] | None = None,
) -> Config:
    """`model(**data)`. Raises ValueError with a complaint for each wrong key.

    options: how one types the keys that come from a command line. A complaint about one of these
    names it so; any other begins with `source`.
    """
    try:
        return model.model_validate(dict(data))
    except ValidationError as error:
        details = error.errors(include_url=False)
        lines = [_from(source, _explain(model, detail), options or {}) for detail in details]
        raise ValueError("; ".join(lines)) from None


def as_typed(message: str, options: Mapping[str, str]) -> str:
    """The message with these keys as one types them. A key of one word is an ordinary word, too,
    but where the message begins."""
    for key, option in options.items():
        at = r"(?<![\w./-])" if re.search(r"[._]", key) else "^"
        message = re.sub(rf"{at}{re.escape(key)}(?![\w/-])", option, message)
    return message


def _from(source: str, line: str, options: Mapping[str, str]) -> str:
    typed = as_typed(line, options)
    return f"{source}: {line}" if source and typed == line else typed


def _explain(model: type[BaseModel], detail: Any) -> str:
    path = [str(part) for part in detail["loc"]]
    key = ".".join(path)
    if detail["type"] == "extra_forbidden":
        known = keys_at(model, path[:-1])
        return f"unknown key {key!r}" + did_you_mean(path[-1], known, prefix=path[:-1])
    if detail["type"] == "missing":
        return f"{key} is required"
    message = detail["msg"].removeprefix("Value error, ")
    if not key:
        return str(message)
    return f"{key} is {detail['input']!r}: {message[:1].lower()}{message[1:]}"


def did_you_mean(key: str, known: list[str], prefix: list[str] | None = None) -> str:
    """A clause to append to a complaint about `key`, naming the nearest of `known`."""
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if nearest:
        return f"; did you mean {'.'.join([*(prefix or []), nearest[0]])!r}?"
    return f"; known keys: {', '.join(sorted(known))}"


def keys_at(model: type[BaseModel], path: list[str]) -> list[str]:
    """The field names of the (nested) model at `path`; a mapping's keys may have any name."""
    parts = iter(path)
    for part in parts:
        field = model.model_fields.get(part)
        annotation = None if field is None else field.annotation
        if get_origin(annotation) is dict:
            annotation = get_args(annotation)[1]
            next(parts, None)
        if not isinstance(annotation, type) or not issubclass(annotation, BaseModel):
            return []
        model = annotation
    return list(model.model_fields)
