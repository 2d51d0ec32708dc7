"""Conversations as data sets record them are read alike by trainings and by files to score."""

from __future__ import annotations

import json
from typing import Any

import pytest
from conversations import CALLING, sequence, tool_renderer
from hypothesis import given
from hypothesis import strategies as st

from reward_actor import Group, dialogues, schema
from reward_actor.client import bodies
from reward_actor.files import group_of
from reward_actor.render import Renderer
from serve.http.requests import parse
from serve.protocols.native import to_group
from trainer.config.data import Columns
from trainer.data.load import gather_rows
from trainer.data.parse import parse_row
from trainer.data.render import Rules


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return tool_renderer()


def test_text_that_looks_like_json_is_messages_in_tables_only() -> None:
    text = json.dumps([{"role": "user", "content": "Hi."}])
    assert dialogues.messages_in(text) is not None
    for plain in ("[1, 2]", "[]", "[x", '["a"]', '[{"a": 1}]', "hello", "[" * 100_000):
        assert dialogues.messages_in(plain) is None
    body = json.dumps({"groups": [{"prompt": text, "completions": ["a"]}]}).encode()
    [group] = parse(schema.ScoreRequest, body).groups
    assert to_group(group).prompt == text  # type: ignore[union-attr]


ROLES = {"Human": "user", "Assistant": "assistant"}
turns = st.lists(
    st.tuples(st.sampled_from(["Human", "Assistant"]), st.text(max_size=12).map(str.strip)),
    max_size=5,
).filter(lambda turns: not any(who + ":" in said for _, said in turns for who in ROLES))


@given(turns, st.sampled_from(["", " ", "\n"]))
def test_a_dialogue_in_text_is_its_turns(turns: list[tuple[str, str]], space: str) -> None:
    turns = [("Human", "Hi."), *turns]
    text = "".join(f"\n\n{who}:{space}{said}{space}" for who, said in turns)
    messages = [{"role": ROLES[who], "content": said} for who, said in turns]
    assert dialogues.dialogue(text) == messages
    asked, said = [*messages, {"role": "user", "content": "So?"}], "Yes."
    whole = f"{text}\n\nHuman: So?\n\nAssistant: {said}"
    assert dialogues.from_dialogue("", whole) == (asked, said)
    prompt = whole.removesuffix(said)
    assert dialogues.from_dialogue(prompt, said) == (asked, said)
    assert dialogues.from_dialogue(prompt, whole) == (asked, said)
    for other in (text[1:], text[2:], "x" + text, "", "\n\nAssistant: Hi."):
        assert dialogues.dialogue(other) is None


HH = "\n\nHuman: Hi.\n\nAssistant: Yes?\n\nHuman: Rain?\n\nAssistant:"
SPOKEN = [
    {"role": "user", "content": "Hi."},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "Rain?"},
]


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": HH + " Yes.", "rejected": HH + " No."},
        {"prompt": HH, "chosen": " Yes.", "rejected": " No."},
        {"prompt": HH, "completions": ["Yes.", " No.\n"]},
        {"prompt": "", "completions": [HH + " Yes.", HH + " No."]},
        {"prompt": SPOKEN, "completions": ["Yes.", "No."]},
    ],
)
def test_a_file_and_a_training_read_a_dialogue_in_text_alike(
    renderer: Renderer, row: dict[str, Any]
) -> None:
    group = group_of(row, "in:1", "chat")
    found = renderer.sequences(group)
    assert found == renderer.sequences(Group(SPOKEN, ["Yes.", "No."]))
    trained = gather_rows({"in": [parse_row(1, row, Columns())]}, renderer, Rules())
    assert trained.comparisons.sequences(0) == found
    bodies.check(group)


MESSAGES = [{"role": "assistant", "content": "Yes."}]
OTHER = {"role": "assistant", "content": "No."}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": SPOKEN, "chosen": MESSAGES, "rejected": "No."},
        {"prompt": SPOKEN, "chosen": [*SPOKEN, *MESSAGES], "rejected": OTHER},
        {"chosen": [*SPOKEN, *MESSAGES], "rejected": json.dumps([*SPOKEN, OTHER])},
        {"prompt": "Rain?", "chosen": MESSAGES, "rejected": "No."},
        {"prompt": json.dumps(SPOKEN), "chosen": json.dumps(MESSAGES), "rejected": "No."},
        {"prompt": HH, "chosen": MESSAGES, "rejected": " No."},
        {"prompt": HH + " Well,", "chosen": [CALLING], "rejected": " no."},
    ],
)
def test_a_file_and_a_training_read_messages_alike(renderer: Renderer, row: dict[str, Any]) -> None:
    group = group_of(row, "in:1", "chat")
    found = renderer.sequences(group)
    trained = gather_rows({"in": [parse_row(1, row, Columns())]}, renderer, Rules())
    assert trained.comparisons.sequences(0) == found
    begun = "Well," in str(row["prompt"]) if "prompt" in row else False
    assert ("Well," in renderer.tokenizer.decode(found[0])) == begun  # type: ignore[arg-type]


def test_under_text_a_dialogue_is_text() -> None:
    pair = {"chosen": HH + " Yes.", "rejected": HH + " No."}
    assert group_of(pair, "in:1") == Group("", [*pair.values()])
    row = {"prompt": HH, "completions": [" Yes."]}
    assert group_of(row, "in:1") == Group(HH, [" Yes."])


def test_over_the_network_a_dialogue_in_text_is_what_somebody_typed(renderer: Renderer) -> None:
    body = json.dumps({"groups": [{"prompt": HH, "completions": ["a"]}]}).encode()
    [group] = parse(schema.ScoreRequest, body).groups
    typed = to_group(group)
    assert typed.prompt == HH  # type: ignore[union-attr]
    assert HH in renderer.tokenizer.decode(sequence(renderer, typed))


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"chosen": "Q: A", "rejected": "Q: B"}, "chosen: a text without a prompt is no"),
        ({"chosen": HH + "A", "rejected": "Q: B"}, "rejected: a text without a prompt is no"),
        ({"prompt": "\n\nHuman: Hi.", "completions": ["a"]}, "completions.0: the last turn of"),
        (
            {"chosen": HH + "A", "rejected": HH[:30] + "B"},
            "its completions answer different",
        ),
        ({"prompt": HH, "chosen": "a"}, "needs completions"),
    ],
)
def test_a_row_that_is_no_dialogue_is_refused(row: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=f"in:1: {why}"):
        group_of(row, "in:1", "chat")


def test_an_empty_prompt_with_other_text_is_an_empty_message() -> None:
    row = {"prompt": "", "completions": ["Hello."]}
    assert group_of(row, "in:1", "chat") == group_of(row, "in:1") == Group("", ["Hello."])
