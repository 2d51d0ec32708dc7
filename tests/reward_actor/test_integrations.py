"""Each trainer's way of asking for rewards: how its prompts become groups, and what travels."""

from __future__ import annotations

import asyncio
import inspect
import json
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from samples import USER
from stub_service import error, named, stub

from reward_actor import Group, RewardServiceError
from reward_actor.integrations import openrlhf, scorers
from reward_actor.integrations.grouping import in_order, to_groups
from reward_actor.integrations.nemo_rl import RewardEnvironment
from reward_actor.integrations.skyrl import RewardStep
from reward_actor.integrations.trl import reward_function, reward_functions
from reward_actor.integrations.verl import compute_score

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
    groups, samples = to_groups(prompts, completions)
    keys = [json.dumps(group.prompt) for group in groups]
    assert len(set(keys)) == len(keys)
    assert not samples.errors
    texts = in_order([list(group.completions) for group in groups], samples.places, {})
    last = [c if isinstance(c, str) else c[-1]["content"] if c else "" for c in completions]
    assert texts == last


def test_of_a_conversation_all_but_the_last_message_is_the_prompt() -> None:
    completion = [
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]},
        {"role": "tool", "name": "f", "content": "42"},
        {"role": "assistant", "content": [{"type": "text", "text": "It is 42."}]},
    ]
    [group] = to_groups([USER], [completion])[0]
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


@pytest.mark.parametrize("asynchronous", [False, True])
def test_trl_calls_can_be_bound_by_the_functions_signature(asynchronous: bool) -> None:
    """As wrappers do that look at the arguments of what they wrap."""
    function: Any = reward_function("http://127.0.0.1:1", asynchronous=asynchronous)
    signature = inspect.signature(function)
    bound = signature.bind(prompts=["p"], completions=["x"], self="a column")
    assert list(signature.parameters) == ["prompts", "completions", "columns"]
    assert bound.arguments["columns"] == {"self": "a column"}
    assert inspect.iscoroutinefunction(function) is asynchronous


TOLD = {"tools": [{"name": "weather"}], "chat_template_kwargs": {"brief": True}}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"name": "weather"}]}
RESULT = {"role": "tool", "content": "17 degrees"}
THOUGHT = {"role": "assistant", "content": None, "reasoning_content": "Hm."}


@pytest.mark.parametrize("asynchronous", [False, True])
def test_trl_a_completion_that_cannot_be_scored_is_none_by_itself(asynchronous: bool) -> None:
    said = {"role": "assistant", "content": "four", "reasoning_content": "Hm."}
    completions = [[said], [CALL], [CALL, RESULT], [THOUGHT], [CALL, RESULT, said]]

    def score(server: Any, completions: list[Any]) -> Any:
        function: Any = reward_function(server.url, asynchronous=asynchronous)
        got = function(prompts=["p"] * len(completions), completions=completions)
        return asyncio.run(got) if asynchronous else got

    with stub() as server:
        assert score(server, completions) == [4.0, 0.0, None, None, 4.0]
        assert score(server, completions[2:4]) == [None, None]
        [request] = server.received
    assert [list(group.completions) for group in request.groups] == [[said, CALL], [said]]


# ---- turn rewards

SEVERAL = [
    {"role": "assistant", "content": "123"},
    {"role": "user", "content": "go on"},
    {"role": "assistant", "content": "12345"},
    {"role": "user", "content": "go on"},
    {"role": "assistant", "content": "1"},
]
BEGUN = [*USER, {"role": "assistant", "content": "x" * 99}, *USER]
RULES = [("mean", 3.0), ("sum", 9.0), ("min", 1.0), (None, 1.0)]


@pytest.mark.parametrize(("rule", "reward"), RULES)
@pytest.mark.parametrize("asynchronous", [False, True])
def test_trl_rewards_all_turns_of_a_completion_and_none_of_its_prompt(
    rule: Any, reward: float, asynchronous: bool
) -> None:
    with stub() as server:
        function: Any = reward_function(server.url, turn_rewards=rule, asynchronous=asynchronous)
        # The second and third end in one group, with another number of turns of their own.
        prompts = [USER, BEGUN, [*BEGUN, *SEVERAL[:2]]]
        got = function(prompts=prompts, completions=["1234", SEVERAL, SEVERAL[2:]])
        if asynchronous:
            got = asyncio.run(got)
    later = {"mean": 3.0, "sum": 6.0, "min": 1.0, None: 1.0}[rule]
    assert got == [4.0, reward, later]


def test_what_is_no_rule_is_named() -> None:
    for wrong in ("max", ["mean"], ""):
        with pytest.raises(ValueError, match=r"turn_rewards is .* must be one of mean, sum, min"):
            reward_function("http://127.0.0.1:1", turn_rewards=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(("rule", "reward"), RULES)
def test_the_other_adapters_rewards_of_turns(rule: Any, reward: float) -> None:
    with stub() as server:
        settings = {"url": server.url, "turn_rewards": rule}
        told = {"extra_info": {"prompt": BEGUN}, **settings}
        assert compute_score("", SEVERAL, None, **told)["score"] == reward
        assert compute_score("", "1234", None, **told)["score"] == 4.0
        env = RewardStep(extras=settings)
        env.init(BEGUN)
        step = env.step("1234")
        assert step["reward"] == 4.0
        assert step["metadata"].get("turn_rewards") == (None if rule is None else [99.0, 4.0])
        nemo = RewardEnvironment({"prompt_key": "messages", **settings})
        log = [{"role": "user", "content": "<templated>"}, *SEVERAL]
        assert nemo.step([log], [{"messages": BEGUN}]).rewards.tolist() == [reward]


# ---- named rewards

ANSWERS = ["1234", "12"]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_trl_functions_of_named_rewards_share_a_request(asynchronous: bool) -> None:
    answers: list[Any] = [error("invalid_request")]
    with stub(lambda got: answers.pop() if answers else named(got)) as server:
        functions: Any = reward_functions(server.url, ["half", "whole"], asynchronous=asynchronous)
        assert [function.__name__ for function in functions] == ["half", "whole"]

        async def awaited(given: dict[str, Any]) -> list[Any]:
            return list(await asyncio.gather(*(function(**given) for function in functions)))

        def asked(prompt: str) -> list[Any]:
            given: dict[str, Any] = {"prompts": [prompt] * 2, "completions": ANSWERS}
            if asynchronous:
                return asyncio.run(awaited(given))
            return [function(**given) for function in functions]

        with pytest.raises(RewardServiceError, match="as the test wants it"):
            asked("p")
        # A batch like the last one is asked for, too: the service may have another model by then.
        assert asked("p") == asked("p") == asked("q") == [[2.0, 1.0], [4.0, 2.0]]
        assert len(server.received) == 4
        assert [function.__name__ for function in pickle.loads(pickle.dumps(functions))] == [
            "half",
            "whole",
        ]
        [none] = reward_functions(server.url, ["none"])
        assert none(prompts=["p"], completions=["x"]) == [None]
        [unknown] = reward_functions(server.url, ["third"])
        with pytest.raises(ValueError, match="no reward named 'third'; it has whole, half, none"):
            unknown(prompts=["p"], completions=["x"])


def test_the_other_adapters_keep_the_names(monkeypatch: pytest.MonkeyPatch) -> None:
    with stub(named) as server:
        told = {"extra_info": {"prompt": "p"}, "url": server.url}
        scored = compute_score("", "1234", None, **told)
        assert scored == {
            "score": 4.0,
            "num_tokens": 1,
            "reward/whole": 4.0,
            "reward/half": 2.0,
            "reward/none": 0.0,
        }
        weights = {"whole": 1.0, "half": -0.5}
        assert compute_score("", "1234", None, **told, reward_weights=weights)["score"] == 3.0
        weights = {"half": 1.0, "none": 9.0}
        assert compute_score("", "1234", None, **told, reward_weights=weights)["score"] == 2.0
        with pytest.raises(ValueError, match="leave turn_rewards out"):
            compute_score("", "1", None, **told, reward_weights=weights, turn_rewards="mean")
        unread = compute_score("", [*USER, RESULT], None, **told, error_reward=-1.0)
        assert unread.keys() == scored.keys()
        assert [unread["score"], unread["num_tokens"], unread["reward/half"]] == [-1.0, 0, -1.0]
        with pytest.raises(ValueError, match="no reward named 'third'"):
            compute_score("", "1234", None, **told, reward_weights={"third": 1.0})
        monkeypatch.setenv(scorers.URL_VARIABLE, server.url)
        logs = openrlhf.reward_func(ANSWERS, ANSWERS, ANSWERS)["extra_logs"]
        assert logs["reward/whole"].tolist() == [4.0, 2.0]
        assert logs["reward/half"].tolist() == [2.0, 1.0]
        assert logs["reward/none"].tolist() == [0.0, 0.0]
        with pytest.raises(ValueError, match="leave turn_rewards out"):
            RewardEnvironment({"url": server.url, "reward_names": ["a"], "turn_rewards": "sum"})
        nemo = RewardEnvironment({"url": server.url, "reward_names": ["half", "whole", "none"]})
        answers = [[*USER, {"role": "assistant", "content": answer}] for answer in ANSWERS]
        lenient = RewardEnvironment(
            {"url": server.url, "reward_names": ["half", "whole"], "error_reward": -1.0}
        )
        rewards = nemo.step(answers, [None] * 2).rewards
        assert {name: of_name.tolist() for name, of_name in rewards.items()} == {
            "reward/half": [2.0, 1.0],
            "reward/whole": [4.0, 2.0],
            "reward/none": [0.0, 0.0],
        }
        rewards = lenient.step([*answers, [*USER, THOUGHT]], [None] * 3).rewards
        assert rewards["reward/half"].tolist() == [2.0, 1.0, -1.0]
        env = RewardStep(extras={"url": server.url})
        env.init(USER)
        step = env.step("1234")
        assert step["metadata"]["named_rewards"] == {"whole": 4.0, "half": 2.0, "none": None}
        assert env.get_metrics()["reward/half"] == 2.0


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


def test_nemo_rl_scores_an_assistants_turn_alone() -> None:
    logs = [[*USER, RESULT], [*USER, THOUGHT], [*USER, {"role": "assistant", "content": "one"}]]
    with stub() as server:
        lenient = RewardEnvironment({"url": server.url, "error_reward": -1.0})
        assert lenient.step(logs, [None] * 3).rewards.tolist() == [-1.0, -1.0, 3.0]
        with pytest.raises(RewardServiceError, match="is of 'tool', not 'assistant'"):
            RewardEnvironment({"url": server.url}).step(logs[:1], [None])


# ---- what the chat template is told


def test_tools_travel_from_where_a_trainer_carries_them() -> None:
    with stub() as server:
        RewardEnvironment({"url": server.url}).step(
            [[*USER, {"role": "assistant", "content": "one"}]] * 2, [TOLD, None]
        )
        address = {"url": server.url}
        for env_config, extras in ((TOLD, address), ({}, {**address, **TOLD})):
            step = RewardStep(env_config, extras)
            step.init(USER)
            step.step("one")
        groups = [group for request in server.received for group in request.groups]
    told = [(group.tools, group.template_args) for group in groups if isinstance(group, Group)]
    with_tools = (TOLD["tools"], TOLD["chat_template_kwargs"])
    assert told == [with_tools, ((), {}), with_tools, with_tools]
