"""Several data sets: how often each row is used, what is held out, what is told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_files import config_of, prepared, questions, write
from exports import make_export
from hypothesis import given
from hypothesis import strategies as st

from reward_actor import Group, RewardScorer
from reward_actor.model.tokenizer import load_tokenizer
from trainer.data.prepare import prepare
from trainer.data.split import epoch_use
from trainer.loss import Labels, comparison_losses


@given(st.lists(st.tuples(st.integers(0, 40), st.floats(0.01, 4)), min_size=1, max_size=4))
def test_a_weight_is_how_often_rows_are_used(sources: list[tuple[int, float]]):
    which = np.repeat(np.arange(len(sources), dtype=np.int32), [num for num, _ in sources])
    weights = [weight for _, weight in sources]
    for epoch in range(2):
        use = epoch_use(which, weights, 3, epoch)
        assert (use == epoch_use(which, weights, 3, epoch)).all()
        times = np.bincount(use, minlength=len(which))
        for number, (num, weight) in enumerate(sources):
            mine = times[which == number]
            assert set(mine) <= {int(weight), int(weight) + 1}
            assert mine.sum() == int(weight) * num + round((weight - int(weight)) * num)


def test_every_epoch_and_every_seed_draws_a_half_of_its_own():
    which = np.repeat(np.arange(2, dtype=np.int32), 20)
    draws = [tuple(epoch_use(which, [0.5, 1], seed, epoch)) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(draws)) == 4
    assert {len(draw) for draw in draws} == {30}
    several = np.concatenate([epoch_use(which, [0.5, 1], 0, epoch) for epoch in range(20)])
    assert set(several) == set(range(40))  # in the end all are seen


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
    used = np.bincount(data.train.sources[data.use(0)])
    assert used.sum() == data.num_used == len(data.use(1))
    assert used.tolist() == [round(per_source[0] / 2), 2 * per_source[1]]
    lines = data.report()
    assert any(line.startswith(f"  {second}: 40 pairs of 40 rows, {used[1]} in") for line in lines)
    assert data.facts.sources[first].num_rows == 40
    assert data.facts.total.shared_fraction > 0.2


def test_repeats_are_used_once_and_contradictions_are_told(base_model: Path, tmp_path: Path):
    rows = questions("Fruit", 8)
    swapped = {**rows[0], "chosen": rows[0]["rejected"], "rejected": rows[0]["chosen"]}
    more = [rows[1], {**rows[2], "margin": 1}, swapped, {**rows[3], "tie": True}]
    file = write(tmp_path / "a.jsonl", [*rows, *more])
    data = prepared(base_model, tmp_path / "out", file)
    assert len(data.train) + len(data.heldout) == 11
    assert str(data.dropped) == "0 too long, 0 with equal sides, 1 used already"
    assert data.facts.num_contradictions == 1
    assert "1 pairs are there both ways round, and kept" in data.report()
    every = prepared(base_model, tmp_path / "out", file, data__deduplicate=False)
    assert len(every.train) + len(every.heldout) == 12


def test_an_evaluation_set_is_held_out_whole(base_model: Path, tmp_path: Path):
    train = write(tmp_path / "a.jsonl", questions("Fruit", 10))
    evaluation = write(tmp_path / "b.jsonl", questions("Fruit", 3) + questions("Tool", 3))
    data = prepared(base_model, tmp_path / "out", train, data__eval=evaluation)
    assert (len(data.train), len(data.heldout)) == (10, 6)
    assert data.heldout.source_names == (evaluation,)
    assert data.report()[0].startswith("10 training pairs of 10 rows; dropped: 0 too long")
    assert [w for w in data.warnings if w.startswith("3 prompts of data.eval are in data.train")]
    assert data.facts.num_shared_prompts == 3
    with pytest.raises(ValueError, match=r"data.eval: the weight of .* is 2"):
        prepared(base_model, tmp_path / "out", train, data__eval=json.dumps({evaluation: 2}))


def test_what_is_left_out_of_an_evaluation_set_is_told(base_model: Path, tmp_path: Path):
    train = write(tmp_path / "a.jsonl", questions("Fruit", 10))
    rows = [{**row, "subset": "tools"} for row in questions("Tool", 4)]
    same = {**rows[0], "rejected": rows[0]["chosen"]}
    # A pair of two subsets counts in both, but in each of them once.
    others = [{**rows[1], "subset": "hard"}, rows[1], {**rows[1], "subset": "hard"}]
    tools = write(tmp_path / "b.jsonl", [*rows, *others, same])
    fruit = write(tmp_path / "c.jsonl", [{**questions("Pear", 1)[0], "prompt": "long " * 200}])
    settings = {"data__over_long": "truncate_left", "model__max_length": 64}
    sets = json.dumps({tools: 1, fruit: 1})
    data = prepared(base_model, tmp_path / "out", train, data__eval=sets, **settings)
    counts = np.bincount(data.heldout.subsets).tolist()
    assert dict(zip(data.heldout.subset_names, counts, strict=True)) == {
        "": 1, "hard": 1, "tools": 4,
    }  # fmt: skip
    facts = data.facts.eval_sources
    assert {name: of.num_comparisons for name, of in facts.items()} == {tools: 5, fruit: 1}
    assert facts[tools].num_duplicates == 2
    shown = "\n".join(data.report()[-2:])
    assert (
        f"evaluated on {tools}: 5 pairs of 8 rows; dropped: 0 too long, 1 with equal sides, 2 used "
        "already; tokens: 5 %"
    ) in shown
    assert f"evaluated on {fruit}: 1 pairs, 1 cut on the left, of 1 rows; dropped: 0" in shown
    assert data.dropped.count == 0  # of the training data


def test_a_split_by_what_completions_share_is_told(base_model: Path, tmp_path: Path):
    pairs = [{"chosen_ids": [5, 9, i, 1], "rejected_ids": [5, 9, i, 2]} for i in range(10, 20)]
    shared = write(tmp_path / "a.jsonl", [*questions("Fruit", 5), *pairs])
    own = write(tmp_path / "b.jsonl", questions("Tool", 5))
    told, few = prepared(base_model, tmp_path / "out", {shared: 1, own: 1}).warnings
    assert few.endswith("a rough guess; rayward train --folds 5 measures by all prompts")
    assert told.startswith(f"{shared}: 10 of 15 rows have no prompt of their own; what their compl")
    assert "rows about one prompt may be both trained on and held out" in told
    assert "Give a prompt column (prompt_ids with token ids) or a data.eval" in told
    assert not prepared(base_model, tmp_path / "out", shared, data__eval_fraction=0).warnings
    (few,) = prepared(base_model, tmp_path / "out", shared, data__eval=own).warnings
    assert few.startswith("the 5 held-out pairs or rankings are about 5 prompts: with")
    assert few.endswith("a rough guess")


def test_what_is_probably_a_mistake_is_told(base_model: Path, tmp_path: Path):
    rows = questions("Fruit", 10)
    long = [{**row, "prompt": "apple " * 200 + row["prompt"]} for row in rows]
    why, how = (
        [{"role": "user", "content": asked}, {"role": "assistant", "content": "No."}]
        for asked in ("Why?", "How?")
    )
    file = write(tmp_path / "a.jsonl", [*rows[:4], {"chosen": why, "rejected": how}, *long])
    told = "\n".join(prepared(base_model, tmp_path / "out", file, model__max_length=64).warnings)
    assert "10 of 15 rows are dropped as longer than 64 tokens; raise model.max_length" in told
    assert "in 1 of 15 rows the completions answer different prompts" in told
    assert len(told.splitlines()) == 3  # and that one prompt is held out


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


def test_template_args_of_a_training_are_its_exports(base_model: Path, tmp_path: Path):
    model = Path(shutil.copytree(base_model, tmp_path / "model"))
    tokenizer = load_tokenizer(model)
    tokenizer.chat_template = "{{ mood }}" + tokenizer.chat_template
    tokenizer.save_pretrained(model)
    rows = questions("Fruit", 10)
    file = write(tmp_path / "a.jsonl", rows)
    config = config_of(model, tmp_path / "out", file, model__template_args="{mood: wry}")
    data, contract = prepare(config)
    told = contract.template_args
    assert told == {"mood": "wry"}
    export = make_export(model, tmp_path / "export", template_args=told)
    scorer = RewardScorer.from_pretrained(export, device="cpu")
    for number, row in enumerate(data.train.rows.tolist()):
        pair = rows[row - 1]
        group = Group(pair["prompt"], [pair["chosen"], pair["rejected"]])
        assert scorer.renderer.sequences(group) == data.train.sequences(number)
        assert tokenizer.decode(data.train.sequences(number)[0]).startswith("wry<|im_start|>")


def test_sources_that_cannot_be_used_together_are_named(base_model: Path, tmp_path: Path):
    file = write(tmp_path / "a.jsonl", questions("Fruit", 10))
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"no row of .*a.jsonl has the attribute 'help'"):
        prepared(base_model, out, file, loss__attributes='{"help": 1}')
    with pytest.raises(ValueError, match=r"data.train: .*a.jsonl is there twice"):
        prepared(base_model, out, {file: 1, f"{tmp_path}/./a.jsonl": 1})
    with pytest.raises(ValueError, match="no pair is left to train"):
        prepared(base_model, out, {file: 0.01})


def test_pairs_without_attributes_mix_with_rows_that_have_them(base_model: Path, tmp_path: Path):
    def single(name: str, num: int) -> list[dict[str, Any]]:
        return [
            {"prompt": f"{name} {i}?", "completion": "So.", "attributes": {name: i}}
            for i in range(num)
        ]

    pairs = write(tmp_path / "a.jsonl", questions("Fruit", 10))
    helpful = write(tmp_path / "b.jsonl", single("help", 10))
    other = write(tmp_path / "c.jsonl", single("tone", 10))
    train = {pairs: 1, helpful: 1, other: 1}
    wanted = '{"help": 1}'
    data = prepared(base_model, tmp_path / "out", train, loss__attributes=wanted)
    assert len(data.train) + len(data.heldout) == 20
    told, _ = data.warnings
    assert told.startswith(f"{other}: nothing is learned or measured from its 10 rows: none is")
    assert any(line.startswith(f"  {other}: 0 pairs of 10 rows, 0 in an") for line in data.report())

    outputs = torch.zeros(data.train.num_sequences, 1, requires_grad=True)
    everything = range(len(data.train))
    labels = Labels.of(data.train, everything, "cpu")
    config = config_of(base_model, tmp_path / "out", train, loss__attributes=wanted).loss
    losses = comparison_losses(outputs, labels, config, has_ties=False).losses
    is_pair = data.train.sources == 0
    np.testing.assert_allclose(losses[is_pair].detach(), np.log(2), rtol=1e-6)
    np.testing.assert_allclose(losses[~is_pair].detach(), labels.attributes[
        data.train.starts[:-1][~is_pair], 0
    ] ** 2)  # fmt: skip
    losses.sum().backward()
    assert torch.isfinite(outputs.grad).all()

    with pytest.raises(ValueError, match=r"no row of .* has the attribute 'brief'"):
        prepared(base_model, tmp_path / "out", train, loss__attributes='{"help": 1, "brief": 1}')
    with pytest.raises(ValueError, match=r"no pair of .*c.jsonl is left.* 10 without a label"):
        prepared(base_model, tmp_path / "out", other)


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


@pytest.mark.parametrize("streaming", [False, True])
def test_a_named_column_must_be_where_it_is_named(
    base_model: Path, tmp_path: Path, ray_cluster: None, streaming: bool
):
    one = write(tmp_path / "a.jsonl", [{**row, "strength": 1.0} for row in questions("Fruit", 9)])
    other = write(tmp_path / "b.jsonl", questions("Tool", 9))
    changes = {"data__streaming": streaming}
    # One of all data sets is in one of them, whichever; one of a data set is in that.
    for train, more in (
        ({one: 1, other: 1}, {"data__margin_column": "strength"}),
        ({other: 1}, {"data__margin_column": "strength", "data__eval": one}),
        ({one: {"margin_column": "strength"}, other: 1}, {}),
    ):
        prepared(base_model, tmp_path / "out", train, **changes, **more)
    wrong = {one: 1, other: {"margin_column": "strength"}}
    with pytest.raises(ValueError, match=r"margin_column: no row of .*b\.jsonl has a column 'stre"):
        prepared(base_model, tmp_path / "out", wrong, **changes)
    with pytest.raises(ValueError, match=r"no row of .*b\.jsonl, .*b\.jsonl has a column 'stre"):
        prepared(
            base_model, tmp_path / "out", other, data__eval=other, data__margin_column="strength",
            **changes,
        )  # fmt: skip


def test_a_fold_needs_pairs_on_both_sides(base_model: Path, tmp_path: Path):
    single = {"completion": "So.", "attributes": {"help": 1}}
    rows = [{"prompt": f"{i}?", **single} for i in range(20)]
    file = write(tmp_path / "a.jsonl", [*rows, *questions("Fruit", 1)])
    sides = []
    for number in (1, 2):
        with pytest.raises(
            ValueError, match=rf"fold: {number}/2: no pair is (held out|train)"
        ) as e:
            prepared(
                base_model, tmp_path / "out", file, data__fold=f"{number}/2",
                loss__attributes='{"help": 1}',
            )  # fmt: skip
        sides.append(str(e.value).split("is ")[1])
    assert sorted(sides) == ["held out; use fewer folds", "trained on; use fewer folds"]
