"""Messages and dialogues of a row: which prompt a completion belongs to, and how it is framed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from data_files import BAD, COLUMNS, DIALOGUE, GOOD, PAIR, USER, rendered, write

from trainer.data.load import choose_format, explain_format, read_rows
from trainer.data.parse import parse_row


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
        return rendered([parsed], renderers["chat"]).comparisons.sequences(0), parsed.key

    assert ids(row) == ids(PAIR)


SYSTEM = {"role": "system", "content": "Be brief."}
TOOL = {"role": "tool", "content": "42"}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "go"}}]}
CALLED = {**CALL, "content": ""}
SPACED = {"role": "user", "content": " Name a fruit.\n"}


@pytest.mark.parametrize(
    ("prompt", "before", "context"),
    [
        ("Name a fruit.", [], [USER]),
        ("Name a fruit.", [SPACED], [SPACED]),
        ("Name a fruit.\n", [USER, GOOD, USER], [USER, GOOD, USER]),
        ([USER], [CALL, TOOL], [USER, CALLED, TOOL]),
        ([USER, CALL], [TOOL], [USER, CALLED, TOOL]),
        ([USER, CALL], [USER, CALL, TOOL], [USER, CALLED, TOOL]),
        ("Name a fruit.", [SYSTEM, USER], [SYSTEM, USER]),
        ([SYSTEM, USER], [USER, GOOD, USER], [SYSTEM, USER, GOOD, USER]),
        ([SYSTEM], [USER], [SYSTEM, USER]),
        ([SYSTEM], [], [SYSTEM]),
        # A conversation that the assistant opens.
        ([GOOD, USER], [GOOD, USER], [GOOD, USER]),
        ([GOOD, USER], [SYSTEM, GOOD, USER], [SYSTEM, GOOD, USER]),
        ([SYSTEM, GOOD, USER], [GOOD, USER], [SYSTEM, GOOD, USER]),
        ([SYSTEM, GOOD, USER], [CALL, TOOL], [SYSTEM, GOOD, USER, CALLED, TOOL]),
    ],
)
def test_messages_repeat_the_prompt_or_continue_it(prompt: Any, before: Any, context: Any):
    row = parse_row(
        1, {"prompt": prompt, "chosen": [*before, GOOD], "rejected": [*before, BAD]}, COLUMNS
    )
    assert [side.prompt for side in row.sides] == [context, context]


@pytest.mark.parametrize(
    ("prompt", "before"),
    [
        ("Name a fruit.", [{**USER, "content": "Name a tool."}]),
        ("Name a fruit.", [SYSTEM]),
        ([SYSTEM, USER], [{**SYSTEM, "content": "Be long."}, USER]),
        ([USER, GOOD, USER], [USER]),
        ([SYSTEM], [{**SYSTEM, "content": "Be long."}, USER]),
        ([USER, CALL], [USER, {**CALL, "tool_calls": [{"function": {"name": "stop"}}]}]),
    ],
)
def test_messages_about_something_else_are_refused(prompt: Any, before: Any):
    raw = {"prompt": prompt, "chosen": [GOOD], "rejected": [*before, BAD]}
    with pytest.raises(ValueError, match="'rejected' neither begins with the prompt nor continues"):
        parse_row(1, raw, COLUMNS)


def test_a_dialogue_in_text_is_scored_as_it_stands(tmp_path: Path, renderers):
    row = {"chosen": DIALOGUE + "An apple.", "rejected": DIALOGUE + "A pan."}
    (parsed,) = read_rows(write(tmp_path / "a.jsonl", [row]), COLUMNS)
    assert parsed.is_dialogue
    assert parsed.key == "Name a fruit."
    assert choose_format("auto", [parsed], has_chat_template=True) == "text"
    chosen, _ = rendered([parsed], renderers["text"]).comparisons.sequences(0)
    assert chosen == renderers["text"].render("", row["chosen"])


FRUIT = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}
ASKED = DIALOGUE.rstrip()
THREE_TURNS = (
    f"{DIALOGUE}An apple.\n\nHuman: Another,\n\nplease.\n\nAssistant:",
    [USER, GOOD, {"role": "user", "content": "Another,\n\nplease."}],
)


@pytest.mark.parametrize(
    ("row", "as_messages"),
    [
        ({"chosen": DIALOGUE + "An apple.\n", "rejected": DIALOGUE + "A pan."}, FRUIT),
        ({"prompt": ASKED, "chosen": " An apple.", "rejected": " A pan."}, FRUIT),
        ({"prompt": DIALOGUE, "chosen": "An apple.", "rejected": "A pan."}, FRUIT),
        ({"prompt": DIALOGUE + "A", "chosen": "n apple.", "rejected": " pan."}, FRUIT),
        ({"prompt": ASKED, "chosen": ASKED + " An apple.", "rejected": ASKED + "A pan."}, FRUIT),
        ({"prompt": ASKED, "chosen": [USER, GOOD], "rejected": [BAD]}, FRUIT),
        (
            {"chosen": THREE_TURNS[0] + " A pear.", "rejected": THREE_TURNS[0] + " A pot."},
            {"prompt": THREE_TURNS[1], "completions": ["A pear.", "A pot."]},
        ),
        (
            {"prompt": ASKED, "completions": [" A.\n\nHuman: B", " C"]},
            {"prompt": [USER], "completions": ["A.\n\nHuman: B", "C"]},
        ),
    ],
)
def test_under_chat_a_dialogue_in_text_is_its_messages(
    renderers, row: dict[str, Any], as_messages: dict[str, Any]
):
    found, expected = (
        rendered([parse_row(1, one, COLUMNS)], renderers["chat"]) for one in (row, as_messages)
    )
    assert found.comparisons.sequences(0) == expected.comparisons.sequences(0)
    assert found.marks["key"] == expected.marks["key"]
    assert found.tallies[0].num_without_prompt == 0


def test_a_dialogue_in_text_may_end_without_a_word(renderers):
    row = parse_row(1, {"chosen": DIALOGUE + "An apple.", "rejected": DIALOGUE}, COLUMNS)
    _, rejected = rendered([row], renderers["chat"]).comparisons.sequences(0)
    assert rejected == renderers["chat"].render([USER], "")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("Q: Why? A: So.", "a text without a prompt is no dialogue; begin it with"),
        ("Human: Hi\n\nAssistant: Hey", "a text without a prompt is no dialogue"),
        ("\n\nHuman: Hi", "the last turn of the dialogue is Human's; end it with"),
        ("\n\nHuman: Hi\n\nAssistant: Hey\n\nHuman: Bye", "the last turn of the dialogue is"),
    ],
)
def test_a_text_that_is_no_dialogue_is_refused_under_chat(renderers, text: str, why: str):
    good = DIALOGUE + "An apple."
    row = parse_row(7, {"chosen": good, "rejected": text}, COLUMNS)
    with pytest.raises(ValueError, match=f"a:7: {why}"):
        rendered([row], renderers["chat"])
    chosen, rejected = rendered([row], renderers["text"]).comparisons.sequences(0)
    assert chosen == renderers["text"].render("", good)
    assert rejected == renderers["text"].render("", text)


def test_messages_need_a_chat_format(tmp_path: Path, renderers):
    read = read_rows(write(tmp_path / "a.jsonl", [{**PAIR, "prompt": [USER]}]), COLUMNS)
    with pytest.raises(ValueError, match="a:1: a list of messages needs a chat contract"):
        rendered(read, renderers["text"])


def test_turns_of_one_conversation_stay_together(tmp_path: Path):
    short = DIALOGUE + "An apple."
    long_ = short + "\n\nHuman: Another?\n\nAssistant: "
    rows = [
        {"chosen": short, "rejected": DIALOGUE + "A pan."},
        {"chosen": long_ + "A pear.", "rejected": long_ + "A pot."},
    ]
    first, second = read_rows(write(tmp_path / "a.jsonl", rows), COLUMNS)
    assert first.key == second.key == "Name a fruit."


@pytest.mark.parametrize(
    ("wanted", "chosen", "has_template", "expected"),
    [
        ("auto", "chat", True, "chat: the tokenizer has a chat template"),
        ("auto", "text", True, "text: they are dialogues in text"),
        ("auto", "text", False, "text: the tokenizer has no chat template"),
        ("text", "text", True, "text: model.format says so"),
    ],
)
def test_why_rows_are_chat_or_text_is_said(
    wanted: Any, chosen: Any, has_template: bool, expected: str
) -> None:
    assert explain_format(wanted, chosen, has_template) == expected
