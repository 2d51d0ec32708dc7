"""Kinds of rows: what becomes of each, as token ids."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from data_files import COLUMNS, PAIR, USER
from hypothesis import given
from hypothesis import strategies as st

from reward_actor.render import Renderer, RenderError, Sample
from trainer.data.comparisons import Comparisons
from trainer.data.load import gather_rows
from trainer.data.parse import parse_line, parse_row
from trainer.data.render import Rules, truncate_left
from trainer.data.rows import Row

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


@pytest.fixture
def with_tools(renderers: dict[str, Renderer]) -> Renderer:
    chat = renderers["chat"]
    contract = replace(chat.contract, chat_template=WITH_TOOLS, max_length=256)
    return Renderer(chat.tokenizer, contract)


@pytest.fixture
def loaded(renderers: dict[str, Renderer], with_tools: Renderer):
    renderers = {**renderers, "tools": with_tools}

    def load(rows: list[dict[str, Any]], renderer: str = "chat", **rules: Any) -> Comparisons:
        several = [parse_row(number, row, COLUMNS) for number, row in enumerate(rows, start=1)]
        return gather_rows({"rows.jsonl": several}, renderers[renderer], Rules(**rules)).comparisons

    return load


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
    apart = {f"{name.removesuffix('_ids')}_input_ids": ids for name, ids in pair.items()}
    assert loaded([apart]).sequences(0) == found.sequences(0)  # TRL, its completions by themselves
    assert parsed(**apart).key == parsed(**pair).key
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
        ({"prompt_input_ids": "ab", "chosen_ids": [1], "rejected_ids": [2]}, "'prompt_input_ids'"),
        ({"chosen_ids": [1, 10**30], "rejected_ids": [1]}, "a token id is from 0 to 2147483647"),
        ({"chosen_ids": [1], "rejected_ids": [-1, 2]}, "'rejected_ids' holds -1; a token id"),
        ({"completions_ids": [[1], [2**31]]}, "'completions_ids' holds 2147483648; a token id"),
        ({"completions_ids": [[1]]}, "'completions_ids' holds 1 completions"),
    ],
)
def test_what_does_not_fit_together_is_refused(row: dict[str, Any], why: str):
    with pytest.raises(ValueError, match=re.escape(why)):
        parsed(**row)


@pytest.fixture
def usual_recursion() -> Iterator[None]:
    """Python's own limit: property tests of this process may have raised it."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(1000)
    yield
    sys.setrecursionlimit(before)


@pytest.mark.parametrize("depth", [600, 200_000])
def test_what_is_nested_too_deeply_is_refused_in_one_line(
    usual_recursion: None, depth: int
) -> None:
    """The second one is too deep for the parser of JSON, the first one for us."""
    tools = '{"x": ' + "[" * depth + "]" * depth + "}"
    text = json.dumps(PAIR)[:-1] + f', "tools": [{tools}]}}'
    for raw in (text, "[" * 200_000):
        with pytest.raises(ValueError, match=r"nested too deeply$"):
            parse_line(1, raw, COLUMNS)


@pytest.mark.parametrize(
    ("row", "has_prompt"),
    [
        (PAIR, True),
        (
            {
                "chosen": [USER, {**USER, "role": "assistant"}],
                "rejected": [USER, {**USER, "role": "assistant"}],
            },
            True,
        ),
        ({"chosen": "\n\nHuman: Why?\n\nAssistant: A.", "rejected": "\n\nHuman: Why?"}, True),
        ({"chosen": "Q: Why? A: Because.", "rejected": "Q: Why? A: No."}, False),
        ({"prompt_ids": [5], "chosen_ids": [7], "rejected_ids": [8]}, True),
        ({"chosen_ids": [5, 7], "rejected_ids": [5, 8]}, False),
    ],
)
def test_a_row_knows_whether_it_says_its_prompt(row: dict[str, Any], has_prompt: bool):
    assert parsed(**row).has_prompt == has_prompt


def test_a_tie_may_say_that_its_margin_is_nothing():
    row = parsed(**PAIR, tie=True, margin=0)
    assert row.is_tie
    assert row.margin == 0


def test_tools_and_template_arguments_reach_the_template(loaded, renderers):
    tools = [{"type": "function", "function": {"name": "look_up", "x": None}}]
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "go"}}]}
    row = {**PAIR, "prompt": [USER, call], "tools": tools, "chat_template_kwargs": {"mood": "wry"}}
    found = loaded([row], "tools")
    text = renderers["chat"].tokenizer.decode(found.sequence(0))
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
