"""Several data sets: how often each row is used, what is held out, what is told."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from data_files import config_of, prepared, questions, write
from hypothesis import given
from hypothesis import strategies as st

from reward_actor.checkpoint import load_tokenizer
from trainer.prepare import epoch_use
from trainer.run import prepare


@given(st.lists(st.tuples(st.integers(0, 40), st.floats(0.01, 4)), min_size=1, max_size=4))
def test_a_weight_is_how_often_rows_are_used(sources: list[tuple[int, float]]):
    which = np.repeat(np.arange(len(sources), dtype=np.int32), [num for num, _ in sources])
    weights = [weight for _, weight in sources]
    use = epoch_use(which, weights, seed=3)
    assert (use == epoch_use(which, weights, seed=3)).all()
    times = np.bincount(use, minlength=len(which))
    for number, (num, weight) in enumerate(sources):
        mine = times[which == number]
        assert set(mine) <= {int(weight), int(weight) + 1}
        assert mine.sum() == int(weight) * num + round((weight - int(weight)) * num)


def test_sources_are_mixed_and_split_by_prompt_over_all_of_them(base_model: Path, tmp_path: Path):
    first = write(tmp_path / "a.jsonl", questions("Fruit", 40))
    other = [
        {"q": row["prompt"], "chosen": "Sure.", "rejected": "Never."}
        for row in questions("Fruit", 20) + questions("Tool", 20)
    ]
    second = write(tmp_path / "b.jsonl", other)
    train = {first: 0.5, second: {"weight": 2, "prompt_column": "q"}}
    data = prepared(base_model, tmp_path / "out", train)
    assert data.train.source_names == (first, second)
    decode = load_tokenizer(base_model).decode
    prompts = [
        {decode(some.sequence(int(i))).split("?")[0] for i in some.starts[:-1]}
        for some in (data.train, data.heldout)
    ]
    assert len(prompts[1]) == 12  # 20 % of 60
    assert not prompts[0] & prompts[1]
    per_source = np.bincount(data.train.sources)
    used = np.bincount(data.train.sources[data.use])
    assert used.tolist() == [round(per_source[0] / 2), 2 * per_source[1]]
    lines = data.report()
    assert any(line.startswith(f"  {second}: 40 pairs of 40 rows, {used[1]} in") for line in lines)
    assert data.facts["sources"][first]["num_rows"] == 40
    assert data.facts["total"]["shared_fraction"] > 0.2


def test_repeats_are_used_once_and_contradictions_are_told(base_model: Path, tmp_path: Path):
    rows = questions("Fruit", 8)
    swapped = {**rows[0], "chosen": rows[0]["rejected"], "rejected": rows[0]["chosen"]}
    more = [rows[1], {**rows[2], "margin": 1}, swapped, {**rows[3], "tie": True}]
    file = write(tmp_path / "a.jsonl", [*rows, *more])
    data = prepared(base_model, tmp_path / "out", file)
    assert len(data.train) + len(data.heldout) == 11
    assert str(data.dropped) == "0 too long, 0 with equal sides, 1 used already"
    assert data.facts["num_contradictions"] == 1
    assert "1 pairs are there both ways round, and kept" in data.report()
    every = prepared(base_model, tmp_path / "out", file, data__deduplicate=False)
    assert len(every.train) + len(every.heldout) == 12


def test_an_evaluation_set_is_held_out_whole(base_model: Path, tmp_path: Path):
    train = write(tmp_path / "a.jsonl", questions("Fruit", 10))
    evaluation = write(tmp_path / "b.jsonl", questions("Fruit", 3) + questions("Tool", 3))
    data = prepared(base_model, tmp_path / "out", train, data__eval=evaluation)
    assert (len(data.train), len(data.heldout)) == (10, 6)
    assert data.heldout.source_names == (evaluation,)
    assert [w for w in data.warnings if w.startswith("3 prompts of data.eval are in data.train")]
    with pytest.raises(ValueError, match=r"data.eval: the weight of .* is 2"):
        prepared(base_model, tmp_path / "out", train, data__eval=json.dumps({evaluation: 2}))


def test_what_is_probably_a_mistake_is_told(base_model: Path, tmp_path: Path):
    rows = questions("Fruit", 10)
    long = [{**row, "prompt": "apple " * 200 + row["prompt"]} for row in rows]
    differ = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "No."}]
    file = write(tmp_path / "a.jsonl", [*rows[:4], {**rows[4], "rejected": differ}, *long])
    del rows[4]["prompt"]
    told = "\n".join(prepared(base_model, tmp_path / "out", file, model__max_length=64).warnings)
    assert "10 of 15 rows are dropped as longer than 64 tokens; raise model.max_length" in told
    assert "in 1 of 15 rows the completions answer different prompts" in told
    assert len(told.splitlines()) == 2


def test_a_second_bos_and_a_date_are_told(base_model: Path, tmp_path: Path):
    tokenizer = load_tokenizer(base_model)
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.chat_template = "{{ strftime_now('%Y') }}" + tokenizer.chat_template
    model = tmp_path / "model"
    model.mkdir()
    for file in base_model.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    tokenizer.save_pretrained(model)
    bos = tokenizer.bos_token_id
    ids = [{"chosen_ids": [bos, bos, i, 1], "rejected_ids": [bos, i, 2]} for i in range(5, 15)]
    file = write(tmp_path / "a.jsonl", [*questions("Fruit", 10), *ids])
    config = config_of(model, tmp_path / "out", file)
    data, contract = prepare(config)
    told = "\n".join(data.warnings)
    assert "the chat template writes today's date" in told
    assert "10 rows begin with two BOS tokens" in told
    (tmp_path / "out" / "template_date.txt").write_text("2020-02-03")
    assert contract.template_date != "2020-02-03"
    assert prepare(config)[1].template_date == "2020-02-03"  # a run goes on with its first day


def test_sources_that_cannot_be_used_together_are_named(base_model: Path, tmp_path: Path):
    file = write(tmp_path / "a.jsonl", questions("Fruit", 10))
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"loss.attributes: no row of .*a.jsonl has any of help"):
        prepared(base_model, out, file, loss__attributes='{"help": 1}')
    with pytest.raises(ValueError, match=r"data.train: .*a.jsonl is there twice"):
        prepared(base_model, out, {file: 1, f"{tmp_path}/./a.jsonl": 1})
    with pytest.raises(ValueError, match="no pair is left to train"):
        prepared(base_model, out, {file: 0.01})


def test_a_directory_or_a_glob_is_its_files_in_order(base_model: Path, tmp_path: Path):
    rows = questions("Fruit", 9)
    whole = write(tmp_path / "all.jsonl", rows)
    parts = tmp_path / "parts"
    parts.mkdir()
    for number in range(3):
        write(parts / f"{number}.jsonl", rows[3 * number : 3 * number + 3])
    expected = prepared(base_model, tmp_path / "out", whole)
    for source in (str(parts), f"{parts}/*.jsonl"):
        data = prepared(base_model, tmp_path / "out", source)
        assert data.train.digest() == expected.train.digest()
        assert data.train.rows.tolist() == expected.train.rows.tolist()
    with pytest.raises(ValueError, match=r"data.train: no file matches"):
        prepared(base_model, tmp_path / "out", f"{parts}/*.parquet")
