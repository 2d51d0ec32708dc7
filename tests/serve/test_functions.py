"""The operator's own reward functions: their file, their rewards, their failures."""

from __future__ import annotations

import asyncio
import re
import time
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest
from applications import application, ask

from reward_actor import binary
from reward_actor.errors import RewardServiceError
from reward_actor.groups import Group, GroupScores, SampleError, Whole, joined
from reward_actor.integrations.grouping import of_name
from serve.ingress.functions import Functions, RewardFunctions
from serve.ingress.service import RewardService

FILE = """
from dataclasses import dataclass

@dataclass
class Settings:
    unit: float = 0.5

SETTINGS = Settings()

def brevity(prompt, completions):
    return [-len(completion) * SETTINGS.unit for completion in completions]

async def question(prompt, completions):
    return [float("?" in str(prompt)) if completion else None for completion in completions]

REWARDS = {"brevity": brevity, "question": question}
WEIGHTS = {"brevity": 2, "question": 1.0}
"""


class Tokenizer:
    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return "".join(map(chr, ids))


def scores(rewards: list[float | None], **more: Any) -> GroupScores:
    n = len(rewards)
    errors = [None if r is not None else SampleError("too_long", "too long") for r in rewards]
    return GroupScores(rewards, rewards, [3] * n, [False] * n, errors, "v", **more)


def added(functions: Functions, groups: list[Any], found: list[GroupScores]) -> list[GroupScores]:
    running = RewardFunctions(functions, request_timeout_s=10)
    return asyncio.run(running.added(groups, found, Tokenizer(), left_s=10))


@pytest.fixture
def functions(tmp_path: Path) -> Functions:
    path = tmp_path / "rewards.py"
    path.write_text(FILE)
    return Functions.load(str(path))


def test_their_rewards_have_names_and_the_weighted_ones_count(functions: Functions) -> None:
    group = Group("Why?", ["four", "", "to"])
    [found] = added(functions, [group], [scores([1.0, 2.0, None])])
    assert found.named_rewards == {
        "model": [1.0, 2.0, None],
        "brevity": [-2.0, 0.0, None],
        "question": [1.0, None, None],
    }
    assert found.rewards == [1.0 - 2 * 2.0 + 1.0, 2.0, None]
    assert found.raw_scores == [1.0, 2.0, None]
    assert found.errors == [None, None, SampleError("too_long", "too long")]
    unweighted = Functions(functions.by_name, {})
    [found] = added(unweighted, [group], [scores([1.0, 2.0, None])])
    assert found.rewards == [1.0, 2.0, None]
    assert RewardFunctions(unweighted, 10).weights == {"brevity": 0.0, "question": 0.0}


def test_a_models_own_names_stay(functions: Functions) -> None:
    named: dict[str, list[float | None]] = {"helpful": [3.0], "kind": [-1.0]}
    [found] = added(functions, [Group("Hi.", ["four"])], [scores([2.0], named_rewards=named)])
    assert found.named_rewards == {**named, "brevity": [-2.0], "question": [0.0]}


def test_they_are_not_asked_about_nothing(functions: Functions) -> None:
    groups = [Group("Hi.", []), Group("Why?", ["four"])]
    none, one = added(functions, groups, [scores([]), scores([2.0])])
    assert none.named_rewards == {"model": [], "brevity": [], "question": []}
    assert none.rewards == none.errors == []
    assert one.named_rewards == {"model": [2.0], "brevity": [-2.0], "question": [1.0]}

    def fails_of_nothing(prompt: Any, completions: Any) -> list[float]:
        return [float(completions[0] == "four")]

    [none] = added(Functions({"first": fails_of_nothing}, {}), groups[:1], [scores([])])
    assert none.named_rewards == {"model": [], "first": []}


def test_they_get_what_was_asked(functions: Functions) -> None:
    seen: list[Any] = []

    def watch(prompt: Any, completions: Any) -> list[float]:
        seen.append((prompt, completions))
        return [0.0] * len(completions)

    messages = [{"role": "user", "content": "Hi."}]
    said = {"role": "assistant", "content": "Yes.", "reasoning_content": "Hm."}
    groups = [
        Group(messages, ["No.", said]),
        Group(prompt_ids=[72, 105], completion_ids=[[33], [63, 63]]),
        Whole(["all of it"]),
        Whole(ids=[[72, 33]]),
    ]
    found = [scores([0.0] * len(group)) for group in groups]
    added(Functions({"watch": watch}, {}), groups, found)
    assert sorted(seen, key=str) == sorted(
        [
            (messages, ["No.", said]),
            ("Hi", ["!", "??"]),
            (None, ["all of it"]),
            (None, ["H!"]),
        ],
        key=str,
    )


def fails(prompt: Any, completions: Any) -> Any:
    raise KeyError(prompt)


def gives(value: Any) -> Any:
    return lambda *_: value


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (fails, r"raised KeyError \(line \d+ of test_functions.py\)"),
        (gives([1.0]), "gave 1 rewards for 2 completions"),
        (gives([1.0, float("nan")]), "a reward that is not finite"),
        (gives(["secret", 1.0]), "raised ValueError"),
        (gives(None), "raised TypeError"),
    ],
)
def test_a_failure_is_an_error_of_its_group(function: Any, why: str) -> None:
    def flaky(prompt: Any, completions: Any) -> Any:
        return function(prompt, completions) if prompt == "secret" else [0.5] * len(completions)

    groups = [Group("secret", ["a", "b"]), Group("fine", ["c"])]
    both = [scores([1.0, None]), scores([2.0])]
    bad, good = added(Functions({"flaky": flaky}, {"flaky": 1.0}), groups, both)
    assert bad.rewards == bad.raw_scores == [None, None]
    assert bad.named_rewards == {"model": [None, None], "flaky": [None, None]}
    [error, kept] = bad.errors
    assert kept == SampleError("too_long", "too long")
    assert error is not None
    assert error.type == "function_failed"
    assert re.search(why, error.message)
    assert "secret" not in error.message
    assert good.rewards == [2.5]
    assert good.errors == [None]


def test_a_name_that_the_model_has_is_refused(functions: Functions) -> None:
    functions.require_other_names(["helpful", "kind"])
    with pytest.raises(ValueError, match="both have a reward named 'brevity'; rename yours"):
        functions.require_other_names(["helpful", "brevity"])
    found = scores([2.0], named_rewards={"brevity": [3.0]})
    with pytest.raises(RewardServiceError, match="both have a reward named 'brevity'"):
        added(functions, [Group("Hi.", ["four"])], [found])


def test_the_scores_of_a_failing_function_still_travel() -> None:
    def flaky(prompt: str, completions: list[str]) -> list[float]:
        return [float(completion) for completion in completions]

    groups = [Group("a", ["1"]), Group("b", ["none"])]
    found = added(Functions({"flaky": flaky}, {}), groups, [scores([1.0]), scores([2.0])])
    body = binary.encode_reply("name", found, {"model_version": "v", "timings_ms": {}})
    _, back = binary.decode_reply(body, [1, 1])
    assert [each.named_rewards for each in back] == [each.named_rewards for each in found]
    assert joined(found).named_rewards == {"model": [1.0, None], "flaky": [1.0, None]}
    assert of_name(found[1], "flaky") == [None]


def test_async_ones_share_an_event_loop_and_no_thread_waits_for_them() -> None:
    loops = []

    async def patient(prompt: str, completions: list[str]) -> list[float]:
        loops.append(asyncio.get_running_loop())
        await asyncio.sleep(0.2)
        return [1.0] * len(completions)

    class Patient:
        async def __call__(self, prompt: str, completions: list[str]) -> list[float]:
            return await patient(prompt, completions)

    def late(prompt: str, completions: list[str]) -> Any:
        return patient(prompt, completions)

    groups, found = [Group("Hi.", ["x"])] * 20, [scores([0.0])] * 20
    running = RewardFunctions(Functions({"patient": patient, "too": Patient()}, {}), 10)
    for _ in range(2):
        each = asyncio.run(running.added(groups, found, None, left_s=10))
        assert {str(one.named_rewards) for one in each} == {
            "{'model': [0.0], 'patient': [1.0], 'too': [1.0]}"
        }
    assert len(set(map(id, loops))) == 1
    [failed] = added(Functions({"late": late}, {}), groups[:1], found[:1])
    [error] = failed.errors
    assert error is not None
    assert "write it with async def" in error.message


def test_those_that_hang_are_told_and_not_waited_for() -> None:
    go_on = Event()

    def hangs(prompt: Any, completions: Any) -> list[float]:
        go_on.wait()
        return [0.0]

    group, found = [Group("Hi.", ["x"])], [scores([0.0])]
    running = RewardFunctions(Functions({"hangs": hangs}, {}), request_timeout_s=0.1)

    async def asked(left_s: float = 0.1) -> None:
        await running.added(group, found, None, left_s)

    for _ in range(4):
        with pytest.raises(RewardServiceError, match=r"no answer .* within 0\.09 s"):
            asyncio.run(asked())
    time.sleep(0.1)
    assert running.hang
    with pytest.raises(RewardServiceError, match="all 4 threads of the reward functions hang"):
        asyncio.run(asked())
    go_on.set()
    while running.hang:
        time.sleep(0.01)
    asyncio.run(asked(left_s=10))


def test_a_service_whose_functions_hang_is_not_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    async def model(self: object) -> Any:
        return SimpleNamespace(version="v")

    monkeypatch.setattr(RewardService, "model", model)
    assert ask(application(), "GET", "/ready").status_code == 200
    monkeypatch.setattr(RewardService, "functions_hang", True)
    reply = ask(application(), "GET", "/ready")
    assert reply.status_code == 503
    assert reply.json()["reason"] == "the reward functions hang"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "is not a file"),
        ("import nowhere", "raises ModuleNotFoundError: No module named 'nowhere'"),
        ("x = 1", "has no REWARDS"),
        ("REWARDS = {'model': print}", "none of which may be 'model'"),
        ("REWARDS = {'a': 7}", "REWARDS has 'a'"),
        ("REWARDS = {'a': print}; WEIGHTS = {'b': 1}", "WEIGHTS has 'b', which REWARDS has not"),
        ("REWARDS = {'a': print}; WEIGHTS = {'a': float('inf')}", "must be finite numbers"),
        ("REWARDS = {'a': print}; WEIGHTS = 3", "WEIGHTS must be"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(
    tmp_path: Path, text: str | None, message: str
) -> None:
    path = tmp_path / "rewards.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=message):
        Functions.load(str(path))
