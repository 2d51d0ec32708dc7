"""Each trainer's way of asking for rewards: how its prompts become groups, and what travels."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from samples import USER
from stub_service import stub

from reward_actor import Group
from reward_actor.integrations import openrlhf, scorers
from reward_actor.integrations.grouping import in_order, to_groups
from reward_actor.integrations.nemo_rl import RewardEnvironment
from reward_actor.integrations.trl import reward_function

# ---- grouping

words = st.text(max_size=3)
messages = st.lists(
    st.fixed_dictionaries({"role": st.just("user"), "content": words}), min_size=1, max_size=2
)
completions = words | st.lists(
    st.fixed_dictionaries({"role": st.just("assistant"), "content": words}), max_size=2
)


@given(st.lists(st.tuples(words | messages, completions), max_size=20))
def test_equal_prompts_become_one_group_and_all_rewards_go_back(
    samples: list[tuple[Any, Any]],
) -> None:
    prompts, completions = [list(column) for column in zip(*samples, strict=True)] or [[], []]
    groups, places = to_groups(prompts, completions)
    keys = [json.dumps(group.prompt) for group in groups]
    assert len(set(keys)) == len(keys)
    texts = in_order([list(group.completions) for group in groups], places)  # type: ignore[type-var]
    last = [c if isinstance(c, str) else c[-1]["content"] if c else "" for c in completions]
    assert texts == last


def test_of_a_conversation_all_but_the_last_message_is_the_prompt() -> None:
    completion = [
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]},
        {"role": "tool", "name": "f", "content": "42"},
        {"role": "assistant", "content": [{"type": "text", "text": "It is 42."}]},
    ]
    [group], _ = to_groups([USER], [completion])
    assert [m["content"] for m in group.prompt or []] == ["Name two fruits.", "", "42"]
    assert group.completions == ["It is 42."]
    with pytest.raises(ValueError, match="a reward model reads text"):
        to_groups([[{"role": "user", "content": [{"type": "image", "image": 1}]}]], ["x"])


# ---- TRL


def test_trl_repeated_prompts_travel_once() -> None:
    with stub() as server:
        function: Any = reward_function(server.url)
        got = function(prompts=["p", "q"] * 8, completions=["x" * n for n in range(16)])
        assert got == [float(n) for n in range(16)]
        [request] = server.received
    assert [len(group) for group in request.groups] == [8, 8]


# ---- OpenRLHF


def test_an_adapter_without_an_address_says_how_to_give_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(scorers.URL_VARIABLE, raising=False)
    with pytest.raises(ValueError, match="RAYWARD_URL=http"):
        openrlhf.reward_func(["x"], ["x"], ["x"])


# ---- NeMo-RL


SYSTEM = {"role": "system", "content": "<templated>Be brief."}
TEMPLATED = {"role": "user", "content": "<templated>Name two fruits."}


@pytest.mark.parametrize("head", [[TEMPLATED], [SYSTEM, TEMPLATED]])
def test_nemo_rl_goes_on_after_the_first_turn(head: list[dict[str, str]]) -> None:
    with stub() as server:
        env = RewardEnvironment({"url": server.url, "prompt_key": "messages"})
        log = [
            *head,
            {"role": "assistant", "content": "one"},
            {"role": "environment", "content": "go on"},
            {"role": "assistant", "content": "two"},
        ]
        env.step([log], [{"messages": USER}])
        [group] = server.received[0].groups
    assert isinstance(group, Group)
    assert [m["content"] for m in group.prompt or []] == ["Name two fruits.", "one", "go on"]
    assert group.completions == ["two"]


@pytest.mark.parametrize("prompt", ["Name two fruits.", USER])
def test_nemo_rl_takes_a_system_prompt_for_no_turn(prompt: Any) -> None:
    """NeMo-RL's math_data_processor writes [system, user], each in the policy's template."""
    with stub() as server:
        env = RewardEnvironment({"url": server.url, "prompt_key": "messages"})
        log = [SYSTEM, TEMPLATED, {"role": "assistant", "content": "one"}]
        env.step([log], [{"messages": prompt}])
        [group] = server.received[0].groups
    assert isinstance(group, Group)
    assert group.prompt == prompt
    assert group.completions == ["one"]
