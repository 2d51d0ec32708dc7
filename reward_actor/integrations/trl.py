"""A reward function for TRL's GRPO, RLOO and Online DPO trainers.

    from trl import GRPOTrainer
    from reward_actor.integrations.trl import reward_function

    trainer = GRPOTrainer(
        model="Qwen/Qwen3-0.6B",
        reward_funcs=reward_function("http://127.0.0.1:8000"),
        train_dataset=dataset,  # with a column "prompt", of texts or of messages
    )

Columns `tools` and `chat_template_kwargs` go to the reward model's chat template, too.

With an `AsyncRewardClient` (or `asynchronous=True`) TRL runs it beside its other reward functions.
TRL calls it with the prompts repeated for each completion; equal prompts go out as one group, so
that their tokens are computed once. Of a completion that is a conversation the last message is
scored, with its calls and reasoning where the template writes them; with `turn_rewards="mean"`
("sum", "min") all assistant turns in it are. A sample without a reward (too long, or ended by a
tool's result) becomes None, which TRL leaves out of its group's advantages.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from types import MethodType
from typing import Any

from reward_actor.client.sync import AsyncRewardClient, RewardClient
from reward_actor.groups import Prompt
from reward_actor.integrations.grouping import (
    Said,
    TurnRewards,
    checked_rule,
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
    if isinstance(scorer, str):
        make = AsyncRewardClient if asynchronous else RewardClient
        scorer = make(scorer, timeout_s=timeout_s)
    elif asynchronous and not inspect.iscoroutinefunction(scorer.score_groups):
        raise ValueError("asynchronous needs an AsyncRewardClient or an AsyncRewardHandle")
    is_async = inspect.iscoroutinefunction(scorer.score_groups)
    return (_AsyncFunction if is_async else _Function)(scorer, rule, name)


class _Scores:
    """What TRL calls: an object, since pickle takes no function that is made in another."""

    def __init__(self, scorer: Any, rule: TurnRewards | None, name: str) -> None:
        self.__name__ = name
        self._scorer = scorer
        self._rule = rule


class _Function(_Scores):
    def __call__(
        self, /, prompts: Sequence[Prompt], completions: Sequence[Said], **columns: Any
    ) -> Rewards:
        groups, samples = to_groups(prompts, completions, *_told(columns))
        scores = self._scorer.score_groups(groups, **wanted(self._rule))
        return samples.rewards(samples.over_turns(scores, completions, self._rule))


class _AsyncFunction(_Scores):
    async def __call__(
        self, /, prompts: Sequence[Prompt], completions: Sequence[Said], **columns: Any
    ) -> Rewards:
        groups, samples = to_groups(prompts, completions, *_told(columns))
        scores = await self._scorer.score_groups(groups, **wanted(self._rule))
        return samples.rewards(samples.over_turns(scores, completions, self._rule))

    # Older versions of TRL ask inspect.iscoroutinefunction, which takes what has these for one.
    __code__ = __call__.__code__
    __defaults__ = __kwdefaults__ = None
    # What has these is taken for a plain function, whose first argument a caller gives.
    __signature__ = inspect.signature(MethodType(__call__, object()))


def _told(columns: Mapping[str, Any]) -> tuple[Any, Any]:
    """What a dataset's columns say to the chat template."""
    return columns.get("tools"), columns.get("chat_template_kwargs")
