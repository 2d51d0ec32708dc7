"""Rollouts on disk: resumed after any end, in order, nothing twice and nothing missing."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest
from disks import fill
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from reward_actor.files import Row
from reward_actor.rollout import rollout_file
from reward_actor.rollout.rollout_file import RolloutFile

RUN = {"policy": "p", "seed": 0, "stop": ("a", "b")}


def row(index: int) -> Row:
    return {"prompt_index": index, "prompt": f"prompt {index} é"}


def same(made: Row) -> list[Row]:
    return [made]


def test_rows_come_in_the_order_of_the_prompts(tmp_path: Path) -> None:
    output = tmp_path / "made" / "out.jsonl"
    with RolloutFile(output, RUN, overwrite=False) as file:
        for index in (2, 0, 1):
            file.add(row(index))
        assert not output.exists()
        assert file.finish(lambda one: [] if one["prompt_index"] == 1 else [one, one]) == 4
    read = [json.loads(line)["prompt_index"] for line in output.read_text().splitlines()]
    assert read == [0, 0, 2, 2]
    assert [path.name for path in output.parent.iterdir()] == ["out.jsonl"]


@given(cut=st.integers(1, 200), num=st.integers(1, 5))
def test_what_a_killed_run_has_written_whole_is_kept(
    tmp_path_factory: pytest.TempPathFactory, cut: int, num: int
) -> None:
    output = tmp_path_factory.mktemp("file") / "out.jsonl"
    with RolloutFile(output, RUN, overwrite=False) as file:
        for index in range(num):
            file.add(row(index))
    content = file.unfinished.read_bytes()
    kept = content[: max(0, len(content) - cut)]
    file.unfinished.write_bytes(kept)
    with RolloutFile(output, RUN, overwrite=False) as again:
        assert again.done == set(range(max(0, kept.count(b"\n") - 1)))
        for index in set(range(num)) - again.done:
            again.add(row(index))
        assert list(again.rows()) == [row(index) for index in range(num)]
        assert again.finish(same) == num


def test_nothing_is_left_of_a_run_that_has_done_nothing(tmp_path: Path) -> None:
    with RolloutFile(tmp_path / "out.jsonl", RUN, overwrite=False):
        pass
    assert list(tmp_path.iterdir()) == []


def test_an_output_is_overwritten_only_when_that_is_asked_for(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    output.write_text("precious\n")
    with pytest.raises(ValueError, match=r"out\.jsonl exists; --overwrite replaces it"):
        RolloutFile(output, RUN, overwrite=False)
    with RolloutFile(output, RUN, overwrite=True) as file:
        file.add(row(0))
        assert output.read_text() == "precious\n", "until the new one is whole"
        file.finish(same)
    assert json.loads(output.read_text()) == row(0)


def test_the_rollouts_of_another_run_are_not_mixed_in(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    with RolloutFile(output, RUN, overwrite=False) as file:
        file.add(row(0))
    other = {**RUN, "seed": 1}
    with pytest.raises(ValueError, match=r"unfinished has 1 prompts of another run.* in seed;"):
        RolloutFile(output, other, overwrite=False)
    with RolloutFile(output, RUN, overwrite=True) as file:
        assert file.done == {0}, "the same command resumes, with the option, too"
    with RolloutFile(output, other, overwrite=True) as file:
        assert file.done == set()


@pytest.mark.parametrize("content", ["my notes\n", "my notes", '{"index": 3'])
def test_a_file_that_is_something_else_is_left_alone(tmp_path: Path, content: str) -> None:
    notes = tmp_path / "out.jsonl.unfinished"
    notes.write_text(content)
    with pytest.raises(ValueError, match=r"unfinished:1: not rollouts; remove the file"):
        RolloutFile(tmp_path / "out.jsonl", RUN, overwrite=True)
    assert notes.read_text() == content


def test_two_runs_do_not_write_the_same_output(tmp_path: Path) -> None:
    with (
        RolloutFile(tmp_path / "out.jsonl", RUN, overwrite=False),
        pytest.raises(ValueError, match="another process writes"),
    ):
        RolloutFile(tmp_path / "out.jsonl", RUN, overwrite=False)


@pytest.mark.parametrize("name", ["out.jsonl.gz", "out.parquet"])
def test_other_formats(tmp_path: Path, name: str) -> None:
    with RolloutFile(tmp_path / name, RUN, overwrite=False) as file:
        file.add({**row(1), "rewards": [None]})
        file.add({**row(0), "rewards": [0.5]})
        assert file.finish(same) == 2
    read: list[Any]
    if name.endswith("gz"):
        with gzip.open(tmp_path / name, "rt") as lines:
            read = [json.loads(line) for line in lines]
    else:
        read = parquet.read_table(tmp_path / name).to_pylist()
    assert read == [{**row(0), "rewards": [0.5]}, {**row(1), "rewards": [None]}]


def test_what_parquet_cannot_hold_is_told_and_kept(tmp_path: Path) -> None:
    with RolloutFile(tmp_path / "out.parquet", RUN, overwrite=False) as file:
        file.add({"prompt_index": 0, "prompt": "text"})
        file.add({"prompt_index": 1, "prompt": [{"role": "user", "content": "messages"}]})
        with pytest.raises(ValueError, match=r"Parquet cannot hold these rows .*; rename .* to "):
            file.finish(same)
    file.unfinished.rename(tmp_path / "out.jsonl.unfinished")
    with RolloutFile(tmp_path / "out.jsonl", RUN, overwrite=False) as file:
        assert file.done == {0, 1}
        assert file.finish(same) == 2


def test_a_parquet_output_has_the_columns_of_every_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first prompt could not be sampled; one of the others has an error."""
    monkeypatch.setattr(rollout_file, "_ROWS_IN_A_GROUP", 2)
    rows: list[Row] = [
        {**row(0), "error": "too long", "completion_ids": []},
        {**row(1), "rewards": [None, 2.0], "completion_ids": [[1], [2, 3]], "id": "q1"},
        {**row(2), "rewards": [1, 2], "completion_ids": [[4], []]},
    ]
    with RolloutFile(tmp_path / "out.parquet", RUN, overwrite=False) as file:
        for one in rows:
            file.add(one)
        assert file.finish(same) == 3
    names = {name for one in rows for name in one}
    read = parquet.read_table(tmp_path / "out.parquet").to_pylist()
    assert read == [{name: one.get(name) for name in names} for one in rows]


def add_many(file: RolloutFile) -> None:
    for index in range(10_000):
        file.add({**row(index), "completions": ["x" * 1000]})


@pytest.mark.process
def test_a_full_disk_costs_no_row_that_was_written(small_disk: Path) -> None:
    ballast = fill(small_disk)
    os.truncate(ballast, ballast.stat().st_size - 100_000)
    with RolloutFile(small_disk / "out.jsonl", RUN, overwrite=False) as file:
        with pytest.raises(OSError, match=r"no room for .*out\.jsonl\.unfinished"):
            add_many(file)
        written = len(file.done)
    assert written > 10
    with RolloutFile(small_disk / "out.jsonl", RUN, overwrite=False) as file:
        assert file.done == set(range(written))
