"""A reward function for TRL's GRPO, RLOO and Online DPO trainers.

    from trl import GRPOTrainer
    from reward_actor.integrations.trl import reward_function

    trainer = GRPOTrainer(
        model="Qwen/Qwen3-0.6B",
        reward_funcs=reward_function("http://127.0.0.1:8000"),
        train_dataset=dataset,  # with a column "prompt", of texts or of messages
    )

Columns `tools` and `chat_template_kwargs` go to the reward model's chat template, too.

Of an ensemble, and of a model with several heads, `reward_functions` gives a function for each
name, which TRL logs, weights (`reward_weights`) and normalizes (`multi_objective_aggregation`) by
itself. A batch is still one request:

    names = ["helpful", "correct"]
    GRPOTrainer(reward_funcs=reward_functions("http://127.0.0.1:8000", names), ...)

With an `AsyncRewardClient` (or `asynchronous=True`) TRL runs it beside its other reward functions.
TRL calls it with the prompts repeated for each completion; equal prompts go out as one group, so
that their tokens are computed once. Of a completion that is a conversation the last message is
scored, with its calls and reasoning where the template writes them; with `turn_rewards="mean"`
("sum", "min") all assistant turns in it are. A sample without a reward (too long, or ended by a
tool's result) becomes None, which TRL leaves out of its group's advantages.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from types import MethodType
from typing import Any, cast

from reward_actor.client.sync import AsyncRewardClient, RewardClient
from reward_actor.groups import Group, GroupScores, Prompt, Whole
from reward_actor.integrations.grouping import (
    Said,
    Samples,
    TurnRewards,
    checked_rule,
    of_name,
    to_groups,
    wanted,
)
from reward_actor.integrations.scorers import AsyncScorer, Scorer

Rewards = list[float | None]


def reward_function(
    scorer: str | Scorer | AsyncScorer,
    *,
    name: str = "rayward",
    asynchronous: bool = False,
    timeout_s: float = 120.0,
    turn_rewards: TurnRewards | None = None,
) -> Callable[..., Rewards] | Callable[..., Awaitable[Rewards]]:
    """f(prompts, completions, **columns) -> one reward, or None, for each completion.

    scorer: an address (or several with commas), a client or a handle; an async one makes an async
    function. name: what TRL logs it as. timeout_s: of a client that is made here. turn_rewards: a
    completion's reward is this over the rewards at the ends of its assistant turns; by default the
    last one. The function raises RewardServiceError where the service is of no help, which ends the
    training. It can be pickled if its scorer can be, as clients and handles can. Raises ValueError
    for a scorer or a rule that is none.
    """
    rule = checked_rule(turn_rewards)
    scorer = _scorer(scorer, asynchronous=asynchronous, timeout_s=timeout_s)
    return _class_for(scorer)(scorer, rule, name)


def reward_functions(
    scorer: str | Scorer | AsyncScorer,
    names: Sequence[str],
    *,
    asynchronous: bool = False,
    timeout_s: float = 120.0,
) -> list[Callable[..., Rewards]] | list[Callable[..., Awaitable[Rewards]]]:
    """A function like `reward_function`'s for each of these named rewards, which it is named like.
    Together they send one request for a batch. They raise ValueError for a name that the service
    does not give."""
    scorer = _scorer(scorer, asynchronous=asynchronous, timeout_s=timeout_s)
    make: Any = _class_for(scorer)
    shared = (_AsyncShared if make is _AsyncFunction else _Shared)(scorer, len(names))
    return [make(shared, None, name, name) for name in names]


def _scorer(
    scorer: str | Scorer | AsyncScorer, *, asynchronous: bool, timeout_s: float
) -> Scorer | AsyncScorer:
    if isinstance(scorer, str):
        make = AsyncRewardClient if asynchronous else RewardClient
        return make(scorer, timeout_s=timeout_s)
    if asynchronous and not inspect.iscoroutinefunction(scorer.score_groups):
        raise ValueError("asynchronous needs an AsyncRewardClient or an AsyncRewardHandle")
    return scorer


def _class_for(scorer: Scorer | AsyncScorer) -> type[_Function | _AsyncFunction]:
    is_async = inspect.iscoroutinefunction(scorer.score_groups)
    return _AsyncFunction if is_async else _Function


class _Shared:
    """Answers as many equal calls in a row as there are functions by one request."""

    def __init__(self, scorer: Any, num_functions: int) -> None:
        self._scorer = scorer
        self._num_functions = num_functions
        self._num_left = 0
        self._groups: Any = None
        self._scores: Any = None

    def __reduce__(self) -> Any:
        return type(self), (self._scorer, self._num_functions)

    def score_groups(self, groups: Sequence[Group | Whole]) -> list[GroupScores]:
        if not self._num_left or groups != self._groups:
            self._num_left = 0  # until there is an answer
            self._groups, self._scores = groups, self._scorer.score_groups(groups)
            self._num_left = self._num_functions
        self._num_left -= 1
        return cast("list[GroupScores]", self._scores)


class _AsyncShared(_Shared):
    async def score_groups(  # type: ignore[override]
        self, groups: Sequence[Group | Whole]
    ) -> list[GroupScores]:
        if not self._num_left or groups != self._groups:
            self._groups, self._num_left = groups, self._num_functions
            self._scores = asyncio.ensure_future(self._scorer.score_groups(groups))
        self._num_left -= 1
        coming = self._scores
        try:
            return cast("list[GroupScores]", await coming)
        except BaseException:
            if coming is self._scores:
                self._num_left = 0
            raise


class _Scores:
    """What TRL calls: an object, since pickle takes no function that is made in another."""

    def __init__(
        self, scorer: Any, rule: TurnRewards | None, name: str, reward: str | None = None
    ) -> None:
        """reward: the named one that it gives."""
        self.__name__ = name
        self._scorer = scorer
        self._rule = rule
        self._reward = reward

    def _rewards(
        self, samples: Samples, scores: Sequence[GroupScores], completions: Sequence[Said]
    ) -> Rewards:
        if self._reward is not None:
            return samples.named(scores, self._reward, of_name)
        return samples.rewards(samples.over_turns(scores, completions, self._rule))


class _Function(_Scores):
    def __call__(
        self, /, prompts: Sequence[Prompt], completions: Sequence[Said], **columns: Any
    ) -> Rewards:
        groups, samples = to_groups(prompts, completions, *_told(columns))
        scores = self._scorer.score_groups(groups, **wanted(self._rule))
        return self._rewards(samples, scores, completions)


class _AsyncFunction(_Scores):
    async def __call__(
        self, /, prompts: Sequence[Prompt], completions: Sequence[Said], **columns: Any
    ) -> Rewards:
        groups, samples = to_groups(prompts, completions, *_told(columns))
        scores = await self._scorer.score_groups(groups, **wanted(self._rule))
        return self._rewards(samples, scores, completions)

    # Older versions of TRL ask inspect.iscoroutinefunction, which takes what has these for one.
    __code__ = __call__.__code__
    __defaults__ = __kwdefaults__ = None
    # What has these is taken for a plain function, whose first argument a caller gives.
    __signature__ = inspect.signature(MethodType(__call__, object()))


def _told(columns: Mapping[str, Any]) -> tuple[Any, Any]:
    """What a dataset's columns say to the chat template."""
    return columns.get("tools"), columns.get("chat_template_kwargs")
