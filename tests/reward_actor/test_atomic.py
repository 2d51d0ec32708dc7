"""Files and directories are replaced whole or not at all, on a full disk, too."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from reward_actor.atomic import replace_text, replacing, replacing_directory


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


def test_a_directory_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "export"
    for text in ("before", "after"):
        with replacing_directory(path, 0) as staging:
            (staging / "weights").write_text(text)
        assert (path / "weights").read_text() == text

    def interrupted() -> None:
        with replacing_directory(path, 0) as staging:
            (staging / "weights").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (path / "weights").read_text() == "after"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.process
def test_a_full_disk_is_named_with_the_room_that_is_needed(small_disk: Path) -> None:
    """safetensors and tokenizers raise exceptions of their own for it."""
    weights = {"weight": torch.zeros(4_000_000)}

    def fill() -> None:
        with replacing_directory(small_disk / "export", 16_000_000) as staging:
            save_file(weights, staging / "model.safetensors")

    with pytest.raises(
        OSError, match=r"export, which needs about 16\.0 MB: its disk has"
    ) as caught:
        fill()
    assert caught.value.errno == errno.ENOSPC

    with pytest.raises(OSError, match=r"no room for .*out\.jsonl: its disk has"):
        replace_text(small_disk / "out.jsonl", "a" * 16_000_000)
    assert list(small_disk.iterdir()) == []


def test_what_cannot_be_written_is_named_as_it_was_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "nowhere" / "out.jsonl"
    with pytest.raises(OSError, match="No such file") as caught:
        replace_text(path, "text")
    assert caught.value.filename == str(path)
