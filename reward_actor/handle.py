"""The reward service from inside the Ray cluster: the client's methods without HTTP or JSON.

Calls go through the ingress, so that limits, deadlines and re-issue hold for them, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from ray import serve
from ray.serve.exceptions import RayServeException

from reward_actor import schema
from reward_actor.groups import Group, GroupScores, Prompt

DEFAULT_APP_NAME = "rayward"


def _app_handle(app_name: str) -> Any:
    try:
        return serve.get_app_handle(app_name)
    except RayServeException as error:
        raise ValueError(
            f"no Serve application {app_name!r} runs in this Ray cluster; start it with "
            f"`rayward serve MODEL --ray-address auto` ({error})"
        ) from error


class RewardHandle:
    """Blocking calls from a driver or a synchronous actor. Raises RewardServiceError."""

    def __init__(self, app_name: str = DEFAULT_APP_NAME, *, timeout_s: float = 120.0) -> None:
        self._handle = _app_handle(app_name)
        self._timeout_s = timeout_s

    def score(self, prompt: Prompt, completions: Sequence[str]) -> GroupScores:
        """The scores of one prompt's completions."""
        return self.score_groups([Group(prompt, completions)])[0]

    def score_groups(
        self, groups: Sequence[Group], token_rewards: bool = False
    ) -> list[GroupScores]:
        reply = self._handle.score_groups.remote(list(groups), token_rewards)
        return cast("list[GroupScores]", reply.result(timeout_s=self._timeout_s))

    def info(self) -> schema.Info:
        return cast("schema.Info", self._handle.info.remote().result(timeout_s=self._timeout_s))


class AsyncRewardHandle:
    """Awaited calls from an asynchronous actor. Raises RewardServiceError.

    `target` is the name of a Serve application or any handle whose `score_groups` and `info` answer
    `.remote()`, a `RewardScorerActor` for one.
    """

    def __init__(self, target: Any = DEFAULT_APP_NAME) -> None:
        self._handle = _app_handle(target) if isinstance(target, str) else target

    async def score(self, prompt: Prompt, completions: Sequence[str]) -> GroupScores:
        """The scores of one prompt's completions."""
        return (await self.score_groups([Group(prompt, completions)]))[0]

    async def score_groups(
        self, groups: Sequence[Group], token_rewards: bool = False
    ) -> list[GroupScores]:
        reply = await self._handle.score_groups.remote(list(groups), token_rewards)
        return cast("list[GroupScores]", reply)

    async def info(self) -> schema.Info:
        return cast("schema.Info", await self._handle.info.remote())
