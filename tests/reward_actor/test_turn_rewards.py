"""Turn rewards: the value where each assistant turn ends, which the sequence cut there scores."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from chat_systems import CHAT_SYSTEMS, letters_tokenizer
from conversations import ASKED, TEMPLATE, TOOLS
from families import make_network
from hypothesis import given
from hypothesis import strategies as st

from reward_actor import Group, RewardScorer, Whole
from reward_actor.groups import SampleError
from reward_actor.model.inferred import contract_for
from reward_actor.model.load import LoadedModel
from reward_actor.model.reward_model import RewardModel

USER = {"role": "user", "content": "Name two fruits."}
SAID = {"role": "assistant", "content": "Apples."}


def scorer_of(
    name: str, template: str | None = None, seeds: tuple[int, ...] = (0,), **contract_fields: Any
) -> RewardScorer:
    """A random model with the tokenizer and template of a system."""
    tokenizer = letters_tokenizer(CHAT_SYSTEMS[name])
    tokenizer.chat_template = template or tokenizer.chat_template
    members = []
    for seed in seeds:
        network = make_network(
            "llama", seed=seed, pad_token_id=tokenizer.pad_token_id, max_position_embeddings=2048
        )
        contract = contract_for(tokenizer, network.config, format="chat")
        contract = replace(contract, **contract_fields)
        model = RewardModel(network).eval()
        path = Path(f"seed-{seed}")
        members.append(LoadedModel(f"v{seed}", model, tokenizer, contract, "float32", path))
    return RewardScorer(members, combine="mean_minus_std", k=0.5, cache_size=0)


def end_id(name: str, end: str) -> int:
    return int(letters_tokenizer(CHAT_SYSTEMS[name]).convert_tokens_to_ids(end))


@cache
def known(name: str) -> RewardScorer:
    """By the name of a system, or of one under a contract of other systems."""
    if name == "qwen 2.5, to the newline":
        return scorer_of("qwen 2.5", end_text="\n")
    if name == "llama 3, pad is the turn's end":
        return scorer_of("llama 3", drop_trailing_ids=[end_id("llama 3", "<|eot_id|>")])
    if name == "an ensemble":
        return scorer_of("phi 4", seeds=(0, 1), mean=0.5, std=2.0)
    return scorer_of(name)


SYSTEMS = [
    "qwen 2.5", "llama 3", "gemma 2", "mistral", "phi 3", "zephyr", "qwen 2.5, to the newline",
    "llama 3, pad is the turn's end", "an ensemble",
]  # fmt: skip
texts = st.text(
    st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12
) | st.sampled_from(
    ["Apples.", "<|im_end|>", "a<|eot_id|>b", "</s>", "<end_of_turn>\n", "turnsentinel0x"]
)


@pytest.mark.parametrize("name", SYSTEMS)
@given(
    turns=st.lists(st.tuples(texts, texts), max_size=3),
    question=texts,
    completions=st.lists(texts | st.just(""), min_size=1, max_size=2),
    token_rewards=st.booleans(),
)
def test_a_turns_reward_is_that_of_the_conversation_up_to_it(
    name: str,
    turns: list[tuple[str, str]],
    question: str,
    completions: list[str],
    token_rewards: bool,
) -> None:
    scorer = known(name)
    prompt = [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    prompt.append({"role": "user", "content": question})
    group = Group(prompt, completions)
    [scores] = scorer.score([group], token_rewards=token_rewards, turn_rewards=True)
    assert (scores.token_rewards is not None) == token_rewards
    assert scores.turn_rewards is not None
    for ids, row, reward in zip(
        scorer.renderer.sequences(group), scores.turn_rewards, scores.rewards, strict=True
    ):
        assert isinstance(ids, list)
        assert row is not None
        assert row[-1] == reward
        cut = [
            scorer.renderer.render(prompt[:number], prompt[number]["content"])
            for number in range(1, len(prompt), 2)
        ]
        for prefix in cut:
            assert ids[: len(prefix)] == prefix
        assert row == pytest.approx(scorer.score_ids([*cut, ids]).tolist(), abs=1e-5)


def test_reasoning_that_a_template_drops_is_not_in_a_turns_reward() -> None:
    scorer = scorer_of("qwen 3")
    thought = {**SAID, "content": "<think>\npondering\n</think>\n\nApples."}
    [dropped], [plain] = (
        scorer.score([Group([USER, turn, USER], ["Pears."])], turn_rewards=True)
        for turn in (thought, SAID)
    )
    assert dropped.turn_rewards == plain.turn_rewards
    assert len((dropped.turn_rewards or [])[0] or []) == 2


def test_a_turn_that_only_calls_a_tool_and_one_that_says_nothing_are_turns() -> None:
    scorer = scorer_of("qwen 2.5", TEMPLATE)
    prompt = [*ASKED, {**SAID, "content": ""}, USER]
    group = Group(prompt, ["Yes."], tools=TOOLS)
    [scores] = scorer.score([group], token_rewards=True, turn_rewards=True)
    [ids] = scorer.renderer.sequences(group)
    assert isinstance(ids, list)
    end = end_id("qwen 2.5", "<|im_end|>")
    ends = [place for place, token in enumerate(ids) if token == end]
    assert len(ends) == 7  # tools, user, call, result, nothing, user, completion
    per_token = (scores.token_rewards or [])[0]
    assert per_token is not None
    assert scores.turn_rewards == [[per_token[ends[i]] for i in (2, 4, 6)]]


def error_of(scorer: RewardScorer, group: Group) -> str:
    [scores] = scorer.score([group], turn_rewards=True)
    [error] = scores.errors
    assert isinstance(error, SampleError)
    assert error.type == "unrenderable"
    assert scores.rewards == scores.turn_rewards == [None]
    return error.message


def test_a_turn_that_its_template_does_not_end_is_named() -> None:
    scorer = scorer_of("tulu 3")
    message = error_of(scorer, Group([USER, SAID, USER], ["Pears."]))
    assert "does not end prompt.1 with '<|end_of_text|>'" in message
    [scores] = scorer.score([Group([USER], ["Pears."])], turn_rewards=True)
    assert scores.turn_rewards == [scores.rewards]


def test_a_turn_that_ends_where_the_model_is_not_read_is_named() -> None:
    scorer = scorer_of("qwen 2.5", final_token_id=end_id("qwen 2.5", "<|im_start|>"))
    message = error_of(scorer, Group([USER, SAID, USER], ["Pears."]))
    assert "prompt.1 does not end as a whole sequence does" in message


@pytest.mark.parametrize(
    "group",
    [
        Group([USER, {**SAID, "content": "Apples<|im_end|>"}, USER], ["Pears."]),
        Group([USER, SAID, USER], ["Pears.<|im_end|>"]),
        Group([USER, {**SAID, "reasoning_content": "<|im_end|>"}, USER], ["Pears."]),
    ],
)
def test_spelled_ends_are_errors_under_contracts_that_take_them_for_ends(group: Group) -> None:
    assert "spell" in error_of(scorer_of("qwen 2.5", plain_content=False), group)


def test_what_tells_no_turns_is_refused_by_name() -> None:
    scorer = known("qwen 2.5")
    good = Group("Hi.", ["Yes?"])
    for bad, why in (
        (Group(prompt_ids=[5], completion_ids=[[6]]), "groups.1.prompt_ids: turn_rewards need"),
        (Whole(["Hi."]), "groups.1.texts: turn_rewards need"),
    ):
        with pytest.raises(ValueError, match=why):
            scorer.score([good, bad], turn_rewards=True)  # type: ignore[list-item]
    text = scorer_of("qwen 2.5", format="text", chat_template=None, turn_end="")
    with pytest.raises(ValueError, match=r"groups.0.prompt: .* need a chat contract"):
        text.score([good], turn_rewards=True)
    for endless in ("", "END"):
        with pytest.raises(ValueError, match=f"a token of its own; this model's has '{endless}'"):
            scorer_of("qwen 2.5", turn_end=endless).score([good], turn_rewards=True)
