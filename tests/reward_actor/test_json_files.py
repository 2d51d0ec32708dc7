"""Files of JSON: what is read of them, and that one is replaced whole or not at all."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from reward_actor.json_files import json_lines, json_object, replace_text, replacing


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


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text("before")

    def interrupted() -> None:
        with replacing(path) as file:
            file.write(b"half")
            file.flush()
            assert path.read_text() == "before"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "before"
    replace_text(path, "after \N{SNOWMAN}")
    assert path.read_text(encoding="utf-8") == "after \N{SNOWMAN}"
    assert list(tmp_path.iterdir()) == [path]


def test_a_secret_is_never_readable_for_others(tmp_path: Path) -> None:
    path = tmp_path / "tokens.json"
    path.write_text("before")
    path.chmod(0o644)
    replace_text(path, "after", mode=0o600)
    assert path.stat().st_mode & 0o777 == 0o600
