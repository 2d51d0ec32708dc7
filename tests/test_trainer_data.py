"""Preference data: what is read, refused with file and line, or dropped and counted."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from trainer_runs import overrides, settings, write_pairs

from reward_actor.checkpoint import load_tokenizer
from reward_actor.render import Renderer, contract_for
from trainer.batches import global_batch, micro_batches, steps_per_epoch
from trainer.config import DataConfig, load_config
from trainer.data import check_source, read_rows
from trainer.pairs import PairSet, Prepared, choose_format, render_rows, split_by_prompt
from trainer.run import prepare, resolve_paths

COLUMNS = DataConfig.model_validate({"train": "-"})
USER, GOOD, BAD = (
    {"role": "user", "content": "Name a fruit."},
    {"role": "assistant", "content": "An apple."},
    {"role": "assistant", "content": "A pan."},
)
PAIR = {"prompt": "Name a fruit.", "chosen": "An apple.", "rejected": "A pan."}
DIALOGUE = "\n\nHuman: Name a fruit.\n\nAssistant: "


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in rows))
    return str(path)


@pytest.fixture(scope="module")
def renderers(base_model: Path) -> dict[str, Renderer]:
    from transformers import AutoConfig

    tokenizer, network = load_tokenizer(base_model), AutoConfig.from_pretrained(base_model)
    return {
        name: Renderer(tokenizer, contract_for(tokenizer, network, format=name, max_length=64))
        for name in ("chat", "text")
    }


@pytest.mark.parametrize(
    "row",
    [
        PAIR,
        {**PAIR, "prompt": [USER]},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "Name a fruit.", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    ],
)
def test_every_chat_form_gives_the_same_tokens(tmp_path: Path, renderers, row: dict[str, Any]):
    def ids(form: dict[str, Any]):
        (parsed,) = read_rows(write(tmp_path / "a.jsonl", [form]), COLUMNS)
        assert not parsed.is_dialogue
        ((pair,), _) = render_rows([parsed], renderers["chat"], "a")
        return pair.chosen, pair.rejected, parsed.key

    assert ids(row) == ids(PAIR)


def test_a_dialogue_in_text_is_scored_as_it_stands(tmp_path: Path, renderers):
    row = {"chosen": DIALOGUE + "An apple.", "rejected": DIALOGUE + "A pan."}
    (parsed,) = read_rows(write(tmp_path / "a.jsonl", [row]), COLUMNS)
    assert parsed.is_dialogue
    assert parsed.key == "Name a fruit."
    assert choose_format("auto", [parsed], has_chat_template=True) == "text"
    ((pair,), _) = render_rows([parsed], renderers["text"], "a")
    assert pair.chosen == renderers["text"].render("", row["chosen"])
    with pytest.raises(ValueError, match=r"a:1: a whole dialogue as text cannot be framed"):
        render_rows([parsed], renderers["chat"], "a")


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
    assert read_rows(file, columns)[0].chosen.completion == "a"


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"prompt": "p", "chosen": "a"}, "no column 'rejected' (the row has: prompt, chosen)"),
        ({"prompt": "p", "chosen": "a", "rejected": None}, "no column 'rejected'"),
        ({"prompt": "p", "chosen": " \n", "rejected": "b"}, "'chosen' is empty"),
        ({"prompt": "p", "chosen": [], "rejected": "b"}, "'chosen' is empty"),
        ({"prompt": "p", "chosen": 1, "rejected": "b"}, "'chosen' is int, not text or messages"),
        ({"prompt": 1, "chosen": "a", "rejected": "b"}, "'prompt' is int"),
        ({"prompt": "p", "chosen": ["a"], "rejected": "b"}, "'chosen' must hold messages"),
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


def test_a_hub_name_that_cannot_be_loaded_is_named():
    with pytest.raises(ValueError, match="no-such/data-set cannot be loaded from the Hugging Face"):
        read_rows("no-such/data-set", COLUMNS)


def test_equal_sides_and_over_long_pairs_are_dropped_and_counted(tmp_path: Path, renderers):
    rows = [PAIR, {**PAIR, "rejected": PAIR["chosen"]}, {**PAIR, "chosen": "apple " * 80}]
    read = read_rows(write(tmp_path / "a.jsonl", rows), COLUMNS)
    pairs, dropped = render_rows(read, renderers["chat"], "a")
    assert [pair.row.number for pair in pairs] == [1]
    assert (dropped.num_identical, dropped.num_too_long) == (1, 1)
    report = Prepared(PairSet.of(pairs), PairSet.of([]), 3, dropped).report(64)
    assert "1 too long, 1 with equal sides" in report[0]
    with pytest.raises(ValueError, match=r"no pair of a is left.*1 too long, 1 with equal sides"):
        render_rows(read[1:], renderers["chat"], "a")


def test_messages_need_a_chat_format(tmp_path: Path, renderers):
    read = read_rows(write(tmp_path / "a.jsonl", [{**PAIR, "prompt": [USER]}]), COLUMNS)
    with pytest.raises(ValueError, match="a:1: a list of messages needs a chat contract"):
        render_rows(read, renderers["text"], "a")


@pytest.fixture(scope="module")
def many(renderers, tmp_path_factory: pytest.TempPathFactory):
    """120 pairs about 40 prompts."""
    rows = [
        {"prompt": f"Question {i % 40}?", "chosen": f"Yes, {i}.", "rejected": f"No, not {i}."}
        for i in range(120)
    ]
    file = write(tmp_path_factory.mktemp("many") / "a.jsonl", rows)
    return render_rows(read_rows(file, COLUMNS), renderers["chat"], "a")[0]


@given(st.floats(0.01, 0.9), st.integers(0, 99), st.randoms())
def test_the_split_is_by_prompt_and_blind_to_the_order(many, fraction, seed, rng: random.Random):
    train, heldout = split_by_prompt(many, fraction, seed)
    prompts = {pair.row.key for pair in heldout}
    assert len(prompts) == max(1, round(fraction * 40))
    assert not prompts & {pair.row.key for pair in train}
    assert len(train) + len(heldout) == 120
    shuffled = list(many)
    rng.shuffle(shuffled)
    assert {p.row.key for p in split_by_prompt(shuffled, fraction, seed)[1]} == prompts


def test_a_split_that_leaves_nothing_is_refused(many):
    assert split_by_prompt(many, 0, 0) == (many, [])
    with pytest.raises(ValueError, match="none left to train"):
        split_by_prompt(many[:1], 0.05, 0)


def test_turns_of_one_conversation_stay_together(tmp_path: Path):
    short = DIALOGUE + "An apple."
    long_ = short + "\n\nHuman: Another?\n\nAssistant: "
    rows = [
        {"chosen": short, "rejected": DIALOGUE + "A pan."},
        {"chosen": long_ + "A pear.", "rejected": long_ + "A pot."},
    ]
    first, second = read_rows(write(tmp_path / "a.jsonl", rows), COLUMNS)
    assert first.key == second.key == "Name a fruit."


def test_a_pair_set_gives_back_its_pairs(many):
    pairs = PairSet.of(many)
    assert len(pairs) == len(many)
    for index, pair in enumerate(many):
        assert (pairs.chosen(index), pairs.rejected(index)) == (pair.chosen, pair.rejected)
        assert pairs.lengths[index] == max(len(pair.chosen), len(pair.rejected))
    assert pairs.num_tokens([0, 1]) == sum(len(p.chosen) + len(p.rejected) for p in many[:2])
    assert pairs.digest() == PairSet.of(many).digest() != PairSet.of(many[1:]).digest()


@given(st.integers(1, 60), st.integers(1, 20), st.integers(0, 2**32))
def test_an_epoch_is_every_pair_once(num_pairs: int, size: int, seed: int):
    steps = steps_per_epoch(num_pairs, size)
    for epoch in range(2):
        batches = [global_batch(num_pairs, size, seed, epoch * steps + i) for i in range(steps)]
        assert sorted(np.concatenate(batches)) == list(range(num_pairs))
        assert all(len(batch) == size for batch in batches[:-1])


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 9), st.integers(1, 5))
def test_workers_share_a_batch_evenly(lengths: list[int], micro: int, workers: int):
    array = np.array(lengths)
    plans = [micro_batches(range(len(lengths)), array, micro, r, workers) for r in range(workers)]
    assert len({len(plan) for plan in plans}) == 1  # the same number of collectives everywhere
    assert sorted(i for plan in plans for part in plan for i in part) == list(range(len(lengths)))
    assert all(len(part) <= micro for plan in plans for part in plan)
    counts = [sum(map(len, plan)) for plan in plans]
    assert max(counts) - min(counts) <= 1


def test_without_a_base_one_is_made_from_the_data_once(tmp_path: Path):
    data = write_pairs(tmp_path / "pairs.jsonl")
    values = settings(tmp_path, data, tmp_path / "out")
    del values["model.path"]
    config = resolve_paths(load_config(None, overrides(values)))
    first, contract = prepare(config)
    base = tmp_path / "out" / "base"
    stamp = (base / "model.safetensors").stat().st_mtime_ns
    again, _ = prepare(config)
    assert contract.format == "chat"
    assert first.train.digest() == again.train.digest()
    assert (base / "model.safetensors").stat().st_mtime_ns == stamp
