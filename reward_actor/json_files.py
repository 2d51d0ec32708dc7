"""Reading files of JSON."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

IS_AN_ARRAY = "is one JSON array over many lines; write each of its objects on a line of its own"


def json_object(path: Path, error: type[ValueError] = ValueError) -> dict[str, Any]:
    """A file's JSON object. Raises `error` for anything else."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as cause:  # JSON that is nested too deeply
        raise error(f"{path} is not JSON: {cause}") from cause
    if not isinstance(data, dict):
        raise error(f"{path} does not hold a JSON object")
    return data


def json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """(place, value) of each line of a .jsonl or .jsonl.gz file that is not blank; place is
    "FILE:LINE", for messages.

    Raises ValueError, with the place, for a damaged file or a line that is not JSON.
    """
    number = num_values = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}:{number}", _value(line, path, number, is_first=not num_values)
                    num_values += 1
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}:{number + 1}: cannot be read: {error}") from error


def _value(line: bytes, path: Path, number: int, *, is_first: bool) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))  # a mark that some tools write first
    except (ValueError, RecursionError) as error:
        if is_first and begins_an_array(line):
            raise ValueError(f"{path} {IS_AN_ARRAY}") from error
        raise ValueError(f"{path}:{number}: not JSON ({error})") from error


def begins_an_array(line: bytes) -> bool:
    """Whether a file's first line begins a list of all rows that goes on in the next one."""
    text = line.decode("utf-8-sig", errors="replace").strip()
    return text[:1] == "[" and text[1:].lstrip()[:1] in ("", "{") and text[-1:] != "]"
