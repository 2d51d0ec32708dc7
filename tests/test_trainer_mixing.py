"""Kinds of rows and several data sets: what becomes of each, how often it is used, what is told."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward_actor.checkpoint import load_tokenizer
from reward_actor.render import Renderer, RenderError, Sample, contract_for
from trainer.comparisons import Comparisons
from trainer.config import Source, TrainConfig, load_config
from trainer.data import load_comparisons
from trainer.parse import parse_row
from trainer.prepare import Prepared, epoch_use
from trainer.rendered import truncate_left
from trainer.rows import Row
from trainer.run import prepare, resolve_paths

COLUMNS = Source.model_validate({})
USER = {"role": "user", "content": "Name a fruit."}
PAIR = {"prompt": "Name a fruit.", "chosen": "An apple.", "rejected": "A pan."}
RANKING = {"prompt": "Name a fruit.", "completions": ["A pan.", "A pear.", "A tree."]}
SINGLE = {"prompt": "Name a fruit.", "completion": "An apple.", "attributes": {"help": 4}}
WITH_TOOLS = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{{ mood }}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}!{{ call.function.name }}{% endfor %}<|im_end|>\n"
    "{% endfor %}"
)


def parsed(**raw: Any) -> Row:
    return parse_row(1, raw, COLUMNS)


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def questions(name: str, num: int) -> list[dict[str, Any]]:
    return [
        {"prompt": f"{name} {i}?", "chosen": f"Yes, {i}.", "rejected": f"No, not {i}."}
        for i in range(num)
    ]


@pytest.fixture(scope="module")
def renderers(base_model: Path) -> dict[str, Renderer]:
    from transformers import AutoConfig

    tokenizer, network = load_tokenizer(base_model), AutoConfig.from_pretrained(base_model)
    made = {
        name: Renderer(tokenizer, contract_for(tokenizer, network, format=name, max_length=64))
        for name in ("chat", "text")
    }
    contract = replace(made["chat"].contract, chat_template=WITH_TOOLS, max_length=256)
    return {**made, "tools": Renderer(tokenizer, contract)}


@pytest.fixture
def loaded(tmp_path: Path, renderers: dict[str, Renderer]):
    def load(rows: list[dict[str, Any]], renderer: str = "chat", **settings: Any) -> Comparisons:
        file = write(tmp_path / "rows.jsonl", rows)
        return load_comparisons({file: COLUMNS}, renderers[renderer], **settings).comparisons

    return load


def config_of(base_model: Path, output_dir: Path, train: Any, **changes: Any) -> TrainConfig:
    values = {
        "model.path": base_model,
        "model.dtype": "float32",
        "data.train": json.dumps(train) if isinstance(train, dict) else train,
        "data.eval_fraction": 0.2,
        "output_dir": output_dir,
        **{key.replace("__", "."): value for key, value in changes.items()},
    }
    overrides = [(key, str(value)) for key, value in values.items()]
    return resolve_paths(load_config(None, overrides))


def prepared(*args: Any, **changes: Any) -> Prepared:
    return prepare(config_of(*args, **changes))[0]


def test_a_ranking_is_sorted_by_its_scores_and_stays_in_order_where_they_tie():
    row = parsed(**RANKING, scores=[1, 8.5, 8.5], attributes=[{"help": 1}, None, {"help": 3}])
    assert [side.completion for side in row.sides] == ["A pear.", "A tree.", "A pan."]
    assert row.scores == (8.5, 8.5, 1.0)
    assert row.attributes == ({}, {"help": 3.0}, {"help": 1.0})
    assert parsed(**RANKING).scores == (2.0, 1.0, 0.0)
    assert parsed(**RANKING, scores=[3, 3, 3]).is_tie


def test_two_ranked_completions_are_a_pair(loaded):
    two = {"prompt": PAIR["prompt"], "completions": [PAIR["rejected"], PAIR["chosen"]]}
    assert loaded([{**two, "scores": [1, 7]}]).digest() == loaded([PAIR]).digest()
    tie = loaded([{**PAIR, "tie": True}])
    assert tie.scores.tolist() == [0, 0]
    assert tie.scores.tolist() == loaded([{**two, "scores": [4, 4]}]).scores.tolist()


def test_attributes_stand_beside_their_sequences(loaded):
    rows = [
        {**PAIR, "attributes": [{"help": 4, "other": 9}, {"help": 1, "tone": None}]},
        SINGLE,
        {**PAIR, "prompt": "Another?"},
        {**SINGLE, "attributes": {"other": 1}},
    ]
    found = loaded(rows, attributes=("help", "tone"))
    assert found.rows.tolist() == [1, 2, 3]  # the last one has nothing to learn
    expected = [[4, math.nan], [1, math.nan], [4, math.nan], *[[math.nan] * 2] * 2]
    np.testing.assert_array_equal(found.attributes, np.array(expected, dtype=np.float32))


def test_token_ids_are_scored_as_given(loaded):
    pair = {"prompt_ids": [5, 9], "chosen_ids": [7, 2], "rejected_ids": [8, 2, 3]}
    trl = {"chosen_input_ids": [5, 9, 7, 2], "rejected_input_ids": [5, 9, 8, 2, 3]}
    ranking = {"prompt_ids": [5], "completions_ids": [[7], [8], [6]], "scores": [1, 3, 2]}
    found = loaded([pair, trl, ranking])
    assert found.sequences(0) == found.sequences(1) == [[5, 9, 7, 2], [5, 9, 8, 2, 3]]
    assert found.sequences(2) == [[5, 8], [5, 6], [5, 7]]
    assert parsed(**pair).key == parsed(**trl).key
    with pytest.raises(ValueError, match="outside the vocabulary"):
        loaded([{**pair, "chosen_ids": [10**6]}])


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"prompt": "p"}, "no column 'chosen'"),
        ({**RANKING, "completions": ["one"]}, "'completions' holds 1 completions; a ranking"),
        ({**RANKING, "completions": "one"}, "'completions' is text, not a list of completions"),
        ({**RANKING, "scores": [1, 2]}, "'scores' holds 2 numbers for 3 completions"),
        ({**RANKING, "scores": [1, 2, None]}, "'scores' is null, not a number"),
        ({**RANKING, "margin": 1}, "'margin' is for pairs"),
        ({**RANKING, "tie": True}, "'tie' is for pairs; give a ranking equal scores"),
        ({**PAIR, "tie": True, "margin": 0.5}, "'margin' is 0.5, but the pair is a tie"),
        ({**PAIR, "tie": "yes"}, "'tie' is text, not true or false"),
        ({**PAIR, "attributes": [{"help": 1}]}, "'attributes' holds 1 objects for 2 completions"),
        ({**PAIR, "attributes": {"help": 1}}, "'attributes' is not a list of objects"),
        ({**SINGLE, "attributes": {"help": "4"}}, "'attributes.help' is text, not a number"),
        ({**SINGLE, "margin": 1}, "'margin' is for pairs"),
        ({**PAIR, "subset": 3}, "'subset' is int, not text"),
        ({**PAIR, "tools": {"name": "f"}}, "'tools' is not a list of tool definitions"),
        ({**PAIR, "chat_template_kwargs": [1]}, "'chat_template_kwargs' is a list, not an object"),
        ({"chosen_ids": [1], "rejected": "b"}, "no column 'rejected_ids'"),
        ({"chosen_ids": ["a"], "rejected_ids": [1]}, "'chosen_ids' must hold token ids"),
        ({"completions_ids": [[1]]}, "'completions_ids' holds 1 completions"),
    ],
)
def test_what_does_not_fit_together_is_refused(row: dict[str, Any], why: str):
    with pytest.raises(ValueError, match=re.escape(why)):
        parsed(**row)


def test_a_tie_may_say_that_its_margin_is_nothing():
    row = parsed(**PAIR, tie=True, margin=0)
    assert row.is_tie
    assert row.margin == 0


def test_tools_and_template_arguments_reach_the_template(loaded, renderers):
    tools = [{"type": "function", "function": {"name": "look_up", "x": None}}]
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "go"}}]}
    row = {**PAIR, "prompt": [USER, call], "tools": tools, "chat_template_kwargs": {"mood": "wry"}}
    found = loaded([row], "tools")
    text = renderers["tools"].tokenizer.decode(found.sequence(0))
    assert "look_up" in text
    assert '"x"' not in text  # a null that a table has put there
    assert "wry" in text
    assert "!go<|im_end|>" in text
    with pytest.raises(ValueError, match=r"rows.jsonl:2: tools need a chat contract"):
        loaded([PAIR, {**PAIR, "tools": tools}], "text")
    for name in ("messages", "tokenize", "add_generation_prompt", "chat_template"):
        with pytest.raises(ValueError, match=f"must not be named '{name}'"):
            loaded([{**PAIR, "chat_template_kwargs": {name: 1}}], "tools")


@given(st.lists(st.tuples(st.text(max_size=20), st.text(max_size=20)), max_size=12))
def test_many_texts_render_as_each_does_alone(renderers, texts: list[tuple[str, str]]):
    texts = [*texts, ("a", "b\ud800")]
    for renderer in renderers.values():
        together = renderer.render_many([Sample(*text) for text in texts])
        for (prompt, completion), found in zip(texts, together, strict=True):
            if isinstance(found, RenderError):
                with pytest.raises(RenderError, match=str(found)):
                    renderer.render(prompt, completion)
            else:
                assert found == renderer.render(prompt, completion)
        assert isinstance(together[-1], RenderError)


@given(
    st.lists(st.integers(1, 9), max_size=12),
    st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=12), min_size=2, max_size=4),
    st.integers(2, 14),
    st.booleans(),
)
def test_truncation_keeps_the_end_and_the_bos(prompt, completions, limit, has_bos):
    prompt = [0, *prompt] if has_bos else prompt
    sequences = [[*prompt, *completion] for completion in completions]
    for before, after in zip(sequences, truncate_left(sequences, limit, 0), strict=True):
        assert len(after) <= limit
        assert len(after) == len(before) or len(after) > has_bos
        assert (after[0] == 0) == has_bos
        tail = after[has_bos:]
        assert tail == before[len(before) - len(tail) :]


def test_truncation_takes_the_same_from_both_sides_where_it_can():
    prompt = list(range(10, 20))
    chosen, rejected = truncate_left([[*prompt, 1, 2, 3], [*prompt, 4]], 8, None)
    assert chosen == [15, 16, 17, 18, 19, 1, 2, 3]
    assert rejected == [15, 16, 17, 18, 19, 4]


def test_over_long_rows_are_dropped_cut_or_refused(loaded):
    rows = [PAIR, {**PAIR, "prompt": "apple " * 80}]
    assert len(loaded(rows)) == 1
    cut = loaded(rows, over_long="truncate_left")
    assert cut.longest_of([1]) == [64]
    assert cut.sequence(2)[-4:] == cut.sequence(0)[-4:]
    with pytest.raises(ValueError, match=r"rows.jsonl:2: \d+ tokens; the model's max_length is 64"):
        loaded(rows, over_long="error")


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
