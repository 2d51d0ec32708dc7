"""Files of JSON: what is read of them."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from reward_actor.json_files import json_lines, json_object


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is not JSON"), ("[" * 100_000, "is not JSON"), ("[]", "does not hold a JSON object")],
)
def test_what_is_no_object_is_named(tmp_path: Path, text: str, message: str) -> None:
    class OurError(ValueError):
        pass

    (tmp_path / "a.json").write_text(text)
    with pytest.raises(OurError, match=rf"a\.json {message}"):
        json_object(tmp_path / "a.json", OurError)


def test_lines_have_their_numbers_with_the_blank_ones_counted(tmp_path: Path) -> None:
    lines = b'\xef\xbb\xbf{"a": 1}\n\n  \n[2]\n"three"'
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    for name in ("a.jsonl", "a.jsonl.gz"):
        found = [(place.rpartition(":")[2], value) for place, value in json_lines(tmp_path / name)]
        assert found == [("1", {"a": 1}), ("4", [2]), ("5", "three")]
