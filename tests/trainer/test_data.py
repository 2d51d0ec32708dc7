"""Preference data: what is read, refused with file and line, or dropped and counted."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from data_files import BAD, COLUMNS, GOOD, PAIR, USER, rendered, with_damage, write
from hypothesis import given
from hypothesis import strategies as st
from trainer_runs import overrides, write_pairs

from reward_actor.sources import check_source, content_mark
from trainer.config.config_file import load_config
from trainer.data.comparisons import Comparisons
from trainer.data.load import load_comparisons, read_rows
from trainer.data.prepare import prepare
from trainer.data.render import hash_key
from trainer.data.split import split_by_prompt
from trainer.run import resolve_paths

if TYPE_CHECKING:
    from trainer.data.rows import Row


def test_every_file_type_gives_the_same_rows(tmp_path: Path):
    import pyarrow as pa
    from pyarrow import parquet

    rows = [{**PAIR, "margin": 0.5}, {**PAIR, "prompt": "Another?", "margin": None}]
    plain = write(tmp_path / "a.jsonl", rows)
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write(Path(plain).read_text())
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    read = [
        read_rows(str(tmp_path / f"a{s}"), COLUMNS) for s in (".jsonl", ".jsonl.gz", ".parquet")
    ]
    assert read[0] == read[1] == read[2]
    assert [row.margin for row in read[0]] == [0.5, 0.0]
    assert len(read_rows(plain, COLUMNS, max_rows=1)) == 1


def test_columns_can_be_renamed(tmp_path: Path):
    columns = COLUMNS.model_copy(update={"chosen_column": "win", "rejected_column": "lose"})
    file = write(tmp_path / "a.jsonl", [{"prompt": "p", "win": "a", "lose": "b"}])
    assert read_rows(file, columns)[0].sides[0].completion == "a"


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"prompt": "p", "chosen": "a"}, "no column 'rejected' (the row has: prompt, chosen)"),
        ({"prompt": "p", "chosen": "a", "rejected": None}, "no column 'rejected'"),
        ({"prompt": "p", "chosen": " \n", "rejected": "b"}, "'chosen' is empty"),
        ({"prompt": "p", "chosen": [], "rejected": "b"}, "'chosen' is empty"),
        ({"prompt": "p", "chosen": 1, "rejected": "b"}, "'chosen' is int, not text or messages"),
        ({"prompt": 1, "chosen": "a", "rejected": "b"}, "'prompt' is int"),
        ({"prompt": "p", "chosen": ["a"], "rejected": "b"}, "'chosen'.0 is text, not a message"),
        (
            {"chosen": [USER], "rejected": [USER, BAD]},
            "the last message of 'chosen' is of 'user', not 'assistant'",
        ),
        (
            {"chosen": [GOOD], "rejected": [BAD]},
            "'chosen' is a lone completion and the row has no prompt",
        ),
        ({**PAIR, "margin": "big"}, "'margin' is text, not a number"),
        ({**PAIR, "margin": True}, "'margin' is bool, not a number"),
        ("[1]\n", "a row must be an object, not a list"),
        ("{nonsense\n", "not JSON"),
    ],
)
def test_a_bad_row_is_named_with_its_line(tmp_path: Path, row: Any, why: str):
    file = write(tmp_path / "a.jsonl", [PAIR, "\n", row])
    with pytest.raises(ValueError, match="1 of 2 rows cannot be used") as error:
        read_rows(file, COLUMNS)
    assert f"{file}:3: {why}" in str(error.value)


def test_all_bad_rows_are_counted_and_three_shown(tmp_path: Path):
    file = write(tmp_path / "a.jsonl", [PAIR, *[{"prompt": "p"}] * 5])
    with pytest.raises(ValueError, match="5 of 6 rows cannot be used") as error:
        read_rows(file, COLUMNS)
    assert str(error.value).count(file) == 3
    assert "and 2 more" in str(error.value)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("nowhere.jsonl", "nowhere.jsonl does not exist"),
        ("nowhere/at/all", "does not exist"),
        ("", "is a directory"),
        ("a.csv", "must end in .jsonl"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path: Path, name: str, why: str):
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(ValueError, match=why):
        check_source(str(tmp_path / name), "data.train")


def test_damaged_and_empty_files_are_named(tmp_path: Path):
    (tmp_path / "a.jsonl.gz").write_text("not gzip")
    (tmp_path / "a.parquet").write_text("not parquet")
    for name in ("a.jsonl.gz", "a.parquet"):
        with pytest.raises(ValueError, match=f"{name} cannot be read"):
            read_rows(str(tmp_path / name), COLUMNS)
    with pytest.raises(ValueError, match="holds no rows"):
        read_rows(write(tmp_path / "empty.jsonl", ["\n"]), COLUMNS)


def test_a_damaged_stream_and_garbage_are_named_with_their_line(tmp_path: Path):
    line = json.dumps(PAIR).encode()
    (tmp_path / "a.jsonl.gz").write_bytes(with_damage(gzip.compress((line + b"\n") * 3)))
    with pytest.raises(ValueError, match=r"a.jsonl.gz cannot be read from line 4 on: Error -3"):
        read_rows(str(tmp_path / "a.jsonl.gz"), COLUMNS)
    plain = tmp_path / "b.jsonl"
    ids = {"chosen_ids": [10**30], "rejected_ids": [1]}
    plain.write_bytes(
        b"\n".join([b"[" * 10**5, json.dumps(ids).encode(), b'{"prompt": "\xff"}', line])
    )
    with pytest.raises(ValueError, match="3 of 4 rows cannot be used") as error:
        read_rows(str(plain), COLUMNS)
    assert f"{plain}:1: nested too deeply" in str(error.value)
    assert f"{plain}:2: 'chosen_ids' holds 1000000" in str(error.value)
    assert f"{plain}:3: not UTF-8: invalid start byte at byte 13" in str(error.value)


def test_files_of_other_tools_are_read_or_told_apart(tmp_path: Path):
    marked = tmp_path / "a.jsonl"
    marked.write_bytes(b"\xef\xbb\xbf" + json.dumps(PAIR).encode() + b"\r\n")
    assert len(read_rows(str(marked), COLUMNS)) == 1
    array = tmp_path / "b.jsonl"
    array.write_text(json.dumps([PAIR, PAIR], indent=1))
    with pytest.raises(ValueError, match=r"b\.jsonl is one JSON array over many lines"):
        read_rows(str(array), COLUMNS)


def test_a_hub_name_that_cannot_be_loaded_is_named():
    with pytest.raises(ValueError, match="no-such/data-set cannot be loaded from the Hugging Face"):
        read_rows("no-such/data-set", COLUMNS)


def test_equal_sides_and_over_long_pairs_are_dropped_and_counted(tmp_path: Path, renderers):
    rows = [PAIR, {**PAIR, "rejected": PAIR["chosen"]}, {**PAIR, "chosen": "apple " * 80}]
    read = read_rows(write(tmp_path / "a.jsonl", rows), COLUMNS)
    gathered = rendered(read, renderers["chat"])
    assert gathered.comparisons.rows.tolist() == [1]
    assert (gathered.tallies[0].num_identical, gathered.tallies[0].num_too_long) == (1, 1)
    loaded = load_comparisons({str(tmp_path / "a.jsonl"): COLUMNS}, renderers["chat"])
    assert (len(loaded.comparisons), loaded.tally.num_rows, loaded.tally.count) == (1, 3, 2)
    assert str(loaded.tally) == "1 too long, 1 with equal sides"
    with pytest.raises(ValueError, match=r"no pair of a is left.*1 too long, 1 with equal sides"):
        rendered(read[1:], renderers["chat"])


@pytest.fixture(scope="module")
def many(renderers, tmp_path_factory: pytest.TempPathFactory):
    """120 pairs about 40 prompts."""
    rows = [
        {"prompt": f"Question {i % 40}?", "chosen": f"Yes, {i}.", "rejected": f"No, not {i}."}
        for i in range(120)
    ]
    file = write(tmp_path_factory.mktemp("many") / "a.jsonl", rows)
    return read_rows(file, COLUMNS)


@given(st.floats(0.01, 0.9), st.integers(0, 99), st.randoms())
def test_the_split_is_by_prompt_and_blind_to_the_order(
    many: list[Row], fraction: float, seed: int, rng: random.Random
):
    def heldout(rows: list[Row]) -> tuple[set[str], set[str]]:
        keys = np.array([hash_key(row.key, seed) for row in rows], dtype="S16")
        is_heldout = split_by_prompt(keys, fraction)
        sides = [{row.key for row, out in zip(rows, is_heldout, strict=True) if out == side}
                 for side in (True, False)]  # fmt: skip
        return sides[0], sides[1]

    prompts, others = heldout(many)
    assert len(prompts) == max(1, round(fraction * 40))
    assert not prompts & others
    assert len(prompts | others) == 40
    shuffled = list(many)
    rng.shuffle(shuffled)
    assert heldout(shuffled) == (prompts, others)


@given(st.integers(2, 40), st.integers(0, 99))
def test_folds_are_parts_of_the_prompts_about_as_large(many: list[Row], num: int, seed: int):
    keys = np.array([hash_key(row.key, seed) for row in many], dtype="S16")
    parts = [
        set(keys[split_by_prompt(keys, 0.05, f"{number}/{num}")].tolist())
        for number in range(1, num + 1)
    ]
    assert sum(map(len, parts)) == len(set().union(*parts)) == 40
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_split_that_leaves_nothing_is_refused():
    keys = np.array([b"one", b"two"], dtype="S16")
    assert not split_by_prompt(keys, 0).any()
    assert split_by_prompt(keys, 0.05).sum() == 1
    with pytest.raises(ValueError, match="none left to train"):
        split_by_prompt(keys[:1], 0.05)
    with pytest.raises(
        ValueError, match=r"data.fold is 1/3, but there are only 2 different prompts"
    ):
        split_by_prompt(keys, 0.05, "1/3")


def test_blocks_give_back_their_rows_in_order(many: list[Row], renderers, monkeypatch):
    whole = rendered(many, renderers["chat"]).comparisons
    monkeypatch.setattr("trainer.data.render.BLOCK_ROWS", 7)
    cut = rendered(many, renderers["chat"])
    assert cut.comparisons.digest() == whole.digest()
    assert cut.comparisons.rows.tolist() == list(range(1, 121))
    for index, row in enumerate(many):
        sides = [renderers["chat"].render(side.prompt, side.completion) for side in row.sides]
        assert whole.sequences(index) == sides
    assert isinstance(whole, Comparisons)


def test_without_a_base_one_is_made_from_the_data_once(tmp_path: Path):
    data = write_pairs(tmp_path / "pairs.jsonl")
    values = {"data.train": data, "model.dtype": "float32", "output_dir": tmp_path / "out"}
    config = resolve_paths(load_config(None, overrides(values)))
    first, contract = prepare(config)
    base = tmp_path / "out" / "base"
    stamp = (base / "model.safetensors").stat().st_mtime_ns
    again, _ = prepare(config)
    assert contract.format == "chat"
    assert first.train.digest() == again.train.digest()
    assert (base / "model.safetensors").stat().st_mtime_ns == stamp


def test_a_hub_data_set_is_marked_by_its_contents() -> None:
    import datasets

    one, same, other = (datasets.Dataset.from_dict({"a": [i]}) for i in (1, 1, 2))
    assert content_mark(one) == content_mark(same) != content_mark(other)
