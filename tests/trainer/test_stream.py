"""Streaming through Ray Data: the same comparisons as in memory, in files, whole or not at all."""

from __future__ import annotations

import gzip
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import data_files
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from reward_actor.json_files import begins_an_array
from reward_actor.sources import read_split, splits
from trainer.config.train import TrainConfig
from trainer.data.comparisons import Comparisons
from trainer.data.prepare import prepare
from trainer.data.stream import prepare_stream

if TYPE_CHECKING:
    from trainer.data.split import Prepared

THINGS = ("apple", "pear", "knife", "spoon", "pan")


def rows_of(name: str, num: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for i in range(num):
        prompt = f"{name}, number {i % (num // 2)}: {THINGS[i % 5]}?"
        rows.append({"prompt": prompt, "chosen": f"Yes, {i}.", "rejected": f"No, {i}."})
        if i % 7 == 0:
            rows.append(rows[-1])  # once more
        if i % 11 == 0:
            rows.append({"prompt": prompt, "completions": ["A.", "B.", "C."], "scores": [1, 2, i]})
        if i % 13 == 0:
            rows.append({"prompt": "long " * 80, "chosen": "a", "rejected": "b", "subset": "long"})
        if i % 17 == 0:
            rows.append({"chosen_ids": [5, i + 9, 2], "rejected_ids": [5, i + 9, 3]})
    return rows


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Three kinds of files, blank lines included."""
    import pyarrow as pa
    from pyarrow import parquet

    root = tmp_path_factory.mktemp("files")
    plain, packed, table = (root / name for name in ("a.jsonl", "b.jsonl.gz", "c.parquet"))
    plain.write_text("\n".join(json.dumps(row) + "\n" * (i % 3) for i, row in
                               enumerate(rows_of("Plain", 60))))  # fmt: skip
    with gzip.open(packed, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows_of("Packed", 40))
    rows = rows_of("Table", 50)
    names = sorted({name for row in rows for name in row})
    columns = {name: [row.get(name) for row in rows] for name in names}
    parquet.write_table(pa.table(columns), table, row_group_size=16)
    return {path.suffix: str(path) for path in (plain, packed, table)}


def config_of(base_model: Path, output_dir: Path, train: Any, **changes: Any) -> TrainConfig:
    return data_files.config_of(base_model, output_dir, train, model__max_length=96, **changes)


def streamed(config: TrainConfig, split_bytes: int = 5000) -> Prepared:
    prepared, contract = prepare(config)
    return replace(prepare_stream(config, contract, split_bytes), row_format=prepared.row_format)


def assert_equal(found: Prepared, expected: Prepared) -> None:
    for name in ("train", "heldout"):
        one, other = getattr(found, name), getattr(expected, name)
        assert one.digest() == other.digest()
        for array in ("rows", "sources", "subsets"):
            np.testing.assert_array_equal(getattr(one, array), getattr(other, array))
        assert one.source_names == other.source_names
        assert one.subset_names == other.subset_names
    for epoch in range(2):
        np.testing.assert_array_equal(found.use(epoch), expected.use(epoch))
    assert found.digest() == expected.digest()
    assert found.facts == expected.facts
    assert found.warnings == expected.warnings
    assert found.dropped == expected.dropped
    assert found.report() == expected.report()


@given(st.lists(st.text(st.characters(exclude_characters="\n\r", exclude_categories=["Cs"]))),
       st.integers(1, 30))  # fmt: skip
def test_splits_of_a_file_are_its_lines(tmp_path_factory, lines: list[str], split_bytes: int):
    assume(not lines or not begins_an_array(lines[0].encode()))  # which is refused
    file = tmp_path_factory.mktemp("lines") / "a.jsonl"
    file.write_bytes("\n".join(lines).encode())
    parts = splits(str(file), split_bytes)
    read = [line.rstrip("\n") for part in parts for line in read_split(part)]
    assert read == "\n".join(lines).split("\n")[: len(read)]
    assert "".join(read) == "".join(lines)


@pytest.mark.parametrize("over_long", ["drop", "truncate_left"])
def test_a_stream_is_what_memory_would_hold(
    ray_cluster, base_model: Path, files: dict[str, str], tmp_path: Path, over_long: str
):
    train = {files[".jsonl"]: 1, files[".gz"]: 1.5, files[".parquet"]: 0.5}
    config = config_of(base_model, tmp_path / "run", train, data__over_long=over_long)
    expected = prepare(config)[0]
    assert len(expected.heldout)
    assert expected.dropped.num_duplicates
    assert "have no prompt of their own" in "\n".join(expected.warnings)
    found = streamed(config)
    assert_equal(found, expected)
    assert isinstance(found.train.ids, np.memmap)
    assert place(found).parent == tmp_path / "run" / "data"
    assert Comparisons.open(place(found) / "heldout").digest() == expected.heldout.digest()
    assert {path.name for path in place(found).iterdir()} == {
        "train",
        "heldout",
        "summary.json",
    }


def place(data: Prepared) -> Path:
    """Where the files of a stream lie."""
    assert data.train.directory is not None
    return data.train.directory.parent


def test_limits_and_an_evaluation_set_stream_alike(
    ray_cluster, base_model: Path, files: dict[str, str], tmp_path: Path
):
    settings = {"data__max_pairs": 23, "data__eval": files[".parquet"]}
    config = config_of(base_model, tmp_path / "run", {files[".jsonl"]: 1}, **settings)
    config.data.streaming = True
    found = prepare(config)[0]
    config.data.streaming = False
    expected = prepare(config)[0]
    assert expected.num_rows == 23
    assert_equal(found, expected)


def test_a_stream_is_used_again_until_something_changes(
    ray_cluster, base_model: Path, files: dict[str, str], tmp_path: Path
):
    data = tmp_path / "a.jsonl"
    data.write_bytes(Path(files[".jsonl"]).read_bytes())
    config = config_of(base_model, tmp_path / "run", {str(data): 1})
    first = streamed(config)
    stamp = (place(first) / "summary.json").stat().st_mtime_ns
    half = config_of(base_model, tmp_path / "run", {str(data): 0.5})
    again = streamed(half)  # which of them are used is decided later
    assert place(again) == place(first)
    assert again.num_used == round(first.num_used / 2)
    assert (place(first) / "summary.json").stat().st_mtime_ns == stamp
    os.utime(data, ns=(1, 1))
    assert place(streamed(config)) != place(first)
    other = config_of(base_model, tmp_path / "run", {str(data): 1}, data__split_seed=1)
    assert len({place(streamed(some)) for some in (config, other)}) == 2


def test_what_is_wrong_is_told_and_leaves_nothing_behind(
    ray_cluster, base_model: Path, files: dict[str, str], tmp_path: Path
):
    good = [json.dumps(row) for row in rows_of("Plain", 30)]
    data = tmp_path / "a.jsonl"
    data.write_text("\n".join([*good, "", '{"prompt": "p", "chosen": "a"}']))
    config = config_of(base_model, tmp_path / "run", {files[".jsonl"]: 1})
    contract = prepare(config)[1]
    config = config_of(base_model, tmp_path / "run", {str(data): 1})
    with pytest.raises(ValueError, match=f"a.jsonl:{len(good) + 2}: no column 'rejected'"):
        prepare_stream(config, contract, 500)
    broken = tmp_path / "b.jsonl.gz"
    broken.write_bytes(Path(files[".gz"]).read_bytes()[:-40])
    config = config_of(base_model, tmp_path / "run", {str(broken): 1})
    with pytest.raises(ValueError, match=r"b.jsonl.gz cannot be read"):
        prepare_stream(config, contract)
    empty = tmp_path / "c.jsonl"
    empty.write_text("\n\n")
    config = config_of(base_model, tmp_path / "run", {str(empty): 1})
    with pytest.raises(ValueError, match=r"c.jsonl holds no rows"):
        prepare_stream(config, contract)
    assert [path.name for path in (tmp_path / "run" / "data").iterdir()] == [".lock"]
