"""The operator's own reward functions, next to the model: `rayward serve MODEL --functions FILE`.

FILE is Python, which runs in every ingress:

    def brevity(prompt, completions):
        return [-len(completion) / 1000 for completion in completions]

    REWARDS = {"brevity": brevity}
    WEIGHTS = {"brevity": 0.5}   # of those that count; the others are only reported

A function gets a prompt (text, or messages) with its completions (texts, or the assistant's
messages), and returns a number for each, or None for one that it has no reward for, which counts
as 0. Groups of token ids are decoded for it; of whole texts the prompt is None. Functions run in
threads, several at a time, those with `async def` in an event loop of their own.
"""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import sys
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from threading import Thread, get_ident
from types import ModuleType
from typing import Any

from reward_actor.errors import RewardServiceError
from reward_actor.groups import Group, GroupScores, SampleError, Whole
from reward_actor.shaping import weighted_sum

Function = Callable[[Any, Sequence[Any]], Any]
Rewards = list[float | None]

MODEL = "model"
"""The name of a model's reward next to those of functions, where it has no names itself."""

_NUM_THREADS = 4
# Below the request's own deadline, so that this is what the caller is told.
_SHARE_OF_DEADLINE = 0.9


@dataclass(frozen=True)
class Functions:
    """By name; weights: of those that count."""

    by_name: Mapping[str, Function]
    weights: Mapping[str, float]

    @classmethod
    def load(cls, path: str) -> Functions:
        """Run the file. Raises ValueError for one that is not there, raises, or lacks what it must
        have."""
        if not Path(path).is_file():
            raise ValueError(f"functions: {path} is not a file")
        try:
            found = _run(path)
        except Exception as error:
            raise ValueError(f"functions: {path} raises {type(error).__name__}: {error}") from error
        by_name, weights = getattr(found, "REWARDS", None), getattr(found, "WEIGHTS", {})
        if not isinstance(by_name, dict) or not by_name:
            raise ValueError(f'functions: {path} has no REWARDS = {{"name": function}}')
        for name, function in by_name.items():
            if not isinstance(name, str) or not name or name == MODEL or not callable(function):
                raise ValueError(
                    f"functions: {path}: REWARDS has {name!r}; it must have functions by their "
                    f"names, none of which may be {MODEL!r}"
                )
        if not isinstance(weights, dict):
            raise ValueError(f'functions: {path}: WEIGHTS must be {{"name": number}}')
        if unknown := [name for name in weights if name not in by_name]:
            raise ValueError(
                f"functions: {path}: WEIGHTS has {unknown[0]!r}, which REWARDS has not"
            )
        if not all(
            type(weight) in (int, float) and isfinite(weight) for weight in weights.values()
        ):
            raise ValueError(f"functions: {path}: WEIGHTS must be finite numbers")
        return cls(by_name, {name: float(weight) for name, weight in weights.items()})

    def require_other_names(self, of_model: Iterable[str]) -> None:
        """Raise ValueError where a model's named reward has the name of one of these."""
        if both := sorted(self.by_name.keys() & set(of_model)):
            raise ValueError(
                f"the model and --functions both have a reward named {both[0]!r}; rename yours"
            )


class RewardFunctions:
    """Functions, and where they run: those with `async def` in an event loop of their own, the
    others in threads."""

    def __init__(self, functions: Functions, request_timeout_s: float) -> None:
        self._functions = functions
        self._request_timeout_s = request_timeout_s
        self._threads = ThreadPoolExecutor(_NUM_THREADS, "reward-function")
        self._running: dict[int, float] = {}  # thread -> when it began what it runs
        self._loop = asyncio.new_event_loop()
        Thread(target=self._loop.run_forever, name="reward-functions", daemon=True).start()

    @property
    def weights(self) -> dict[str, float]:
        """Of all of them; 0 for one that is only reported."""
        return {name: self._functions.weights.get(name, 0.0) for name in self._functions.by_name}

    @property
    def hang(self) -> bool:
        """Whether every thread has run one call for longer than a request may take."""
        begun = [*self._running.values()]
        late = time.monotonic() - self._request_timeout_s
        return len(begun) == _NUM_THREADS and max(begun) < late

    async def added(
        self,
        groups: Sequence[Group | Whole],
        scores: Sequence[GroupScores],
        tokenizer: Any,
        left_s: float,
    ) -> list[GroupScores]:
        """The scores with the functions' rewards. tokenizer: decodes ids; left_s: of the request's
        time. Raises RewardServiceError where they take too long, or hang already, and where the
        model has one of their names."""
        try:
            self._functions.require_other_names(
                name for each in scores for name in each.named_rewards or ()
            )
        except ValueError as error:
            raise RewardServiceError("internal", str(error)) from None
        if self.hang:
            raise RewardServiceError(
                "unavailable",
                f"all {_NUM_THREADS} threads of the reward functions hang; restart the service, "
                "and give what they wait for a timeout",
            )
        calls = [
            self._begin(name, function, group, tokenizer)
            for group in groups
            if len(group)
            for name, function in self._functions.by_name.items()
        ]
        left_s = max(0.0, _SHARE_OF_DEADLINE * left_s)
        try:
            async with asyncio.timeout(left_s):
                answers = iter(await asyncio.gather(*calls))
        except TimeoutError:
            raise RewardServiceError(
                "deadline_exceeded",
                f"no answer of the reward functions within {left_s:.2g} s, what the model had left "
                f"of request_timeout_s = {self._request_timeout_s:g}",
                retryable=True,
            ) from None
        return [
            with_rewards(
                each,
                {name: next(answers) if len(group) else [] for name in self._functions.by_name},
                self._functions.weights,
            )
            for group, each in zip(groups, scores, strict=True)
        ]

    def _begin(
        self, name: str, function: Function, group: Group | Whole, tokenizer: Any
    ) -> Awaitable[Rewards | SampleError]:
        if _is_async(function):
            coming = call_async(name, function, group, tokenizer)
            return asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coming, self._loop))
        loop = asyncio.get_running_loop()
        return loop.run_in_executor(self._threads, self._call, name, function, group, tokenizer)

    def _call(self, *asked: Any) -> Rewards | SampleError:
        thread = get_ident()
        self._running[thread] = time.monotonic()
        try:
            return call(*asked)
        finally:
            del self._running[thread]


def call(
    name: str, function: Function, group: Group | Whole, tokenizer: Any
) -> Rewards | SampleError:
    """The function's rewards of a group, or why there are none, without what anybody wrote."""
    prompt, completions = _asked(group, tokenizer)
    try:
        return _checked(name, function(prompt, completions), len(completions))
    except Exception as error:
        return _failed(name, _raised(error))


async def call_async(
    name: str, function: Function, group: Group | Whole, tokenizer: Any
) -> Rewards | SampleError:
    """`call` of an async function."""
    prompt, completions = _asked(group, tokenizer)
    try:
        return _checked(name, await function(prompt, completions), len(completions))
    except Exception as error:
        return _failed(name, _raised(error))


def _checked(name: str, given: Any, num_completions: int) -> Rewards | SampleError:
    if inspect.iscoroutine(given):
        given.close()
        return _failed(name, "gave what has to be awaited; write it with async def")
    rewards = [None if reward is None else float(reward) for reward in given]
    if len(rewards) != num_completions:
        return _failed(name, f"gave {len(rewards)} rewards for {num_completions} completions")
    if not all(reward is None or isfinite(reward) for reward in rewards):
        return _failed(name, "gave a reward that is not finite")
    return rewards


def _failed(name: str, why: str) -> SampleError:
    return SampleError("function_failed", f"the reward function {name!r} {why}")


def _is_async(function: Function) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004 - an object that is called
    )


def with_rewards(
    scores: GroupScores,
    found: Mapping[str, Rewards | SampleError],
    weights: Mapping[str, float],
) -> GroupScores:
    """The scores with what functions found, by name, and the weighted sum as the reward; where a
    function has failed, its error in place of the group's scores."""
    error = next((each for each in found.values() if isinstance(each, SampleError)), None)
    errors = [here or error for here in scores.errors]
    none: Rewards = [None] * len(errors)
    rewards: dict[str, Rewards] = {
        **(scores.named_rewards or {MODEL: scores.rewards}),
        **{name: none if isinstance(each, SampleError) else each for name, each in found.items()},
    }
    if error is None and weights:
        counted: dict[str, Any] = {name: rewards[name] for name in weights}
        total = weighted_sum(counted | {"": scores.rewards}, weights)
        scores = replace(scores, rewards=total.tolist())
    per_sample: dict[str, Any] = {
        field: [None if e else value for value, e in zip(values, errors, strict=True)]
        for field, values in vars(scores).items()
        if isinstance(values, list) and field not in ("num_tokens", "truncated", "errors")
    }
    named = {
        name: [None if e else value for value, e in zip(values, errors, strict=True)]
        for name, values in rewards.items()
    }
    if per_sample.get("num_prompt_tokens"):
        per_sample["num_prompt_tokens"] = scores.num_prompt_tokens
    return replace(scores, **per_sample, errors=errors, named_rewards=named)


def _asked(group: Group | Whole, tokenizer: Any) -> tuple[Any, list[Any]]:
    def decoded(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=True))

    if isinstance(group, Whole):
        return None, list(group.texts) or [decoded(ids) for ids in group.ids]
    if group.prompt_ids is not None:
        return decoded(group.prompt_ids), [decoded(ids) for ids in group.completion_ids]
    return group.prompt, list(group.completions)


def _run(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location("rayward_functions", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def _raised(error: Exception) -> str:
    """What and where, without its message: that may quote a prompt."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = "" if trace is None else f" (line {trace.tb_lineno} of {_file(trace)})"
    return f"raised {type(error).__name__}{place}"


def _file(trace: Any) -> str:
    return Path(trace.tb_frame.f_code.co_filename).name
