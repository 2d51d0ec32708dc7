"""The reward service from inside the Ray cluster: the client's methods without HTTP or JSON.

Calls go through the ingress, so that limits, deadlines and re-issue hold for them, too.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any, cast

from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException

from reward_actor import schema
from reward_actor.errors import RewardServiceError, pause_s
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


def _as_service_error(error: Exception) -> RewardServiceError:
    """What a failed call means to its caller, in the words that the HTTP client uses."""
    if isinstance(error, RewardServiceError):
        return error
    if isinstance(error, TimeoutError):
        return RewardServiceError("deadline_exceeded", "no scores in time", retryable=True)
    return RewardServiceError("unavailable", f"the ingress is gone: {error}", retryable=True)


_FAILURES = (RewardServiceError, TimeoutError, RayActorError, DeploymentUnavailableError)


class RewardHandle:
    """Blocking calls from a driver or a synchronous actor.

    Tries again as `RewardClient` does, until `timeout_s` after the call began; then raises
    RewardServiceError. Raises ValueError at once when no such application runs.
    """

    def __init__(self, app_name: str = DEFAULT_APP_NAME, *, timeout_s: float = 120.0) -> None:
        self._handle = _app_handle(app_name)
        self._timeout_s = timeout_s

    def score(self, prompt: Prompt, completions: Sequence[str]) -> GroupScores:
        """The scores of one prompt's completions."""
        return self.score_groups([Group(prompt, completions)])[0]

    def score_groups(
        self, groups: Sequence[Group], token_rewards: bool = False
    ) -> list[GroupScores]:
        scores = self._call(self._handle.score_groups, list(groups), token_rewards)
        return cast("list[GroupScores]", scores)

    def info(self) -> schema.Info:
        return cast("schema.Info", self._call(self._handle.info))

    def _call(self, method: Any, *arguments: Any) -> Any:
        deadline = time.monotonic() + self._timeout_s
        attempt = 0
        while True:
            response = method.remote(*arguments)
            try:
                return response.result(timeout_s=max(0.1, deadline - time.monotonic()))
            except _FAILURES as error:
                response.cancel()
                time.sleep(pause_s(_as_service_error(error), attempt, deadline))
            attempt += 1


class AsyncRewardHandle:
    """`RewardHandle` for an asynchronous actor: the same methods, awaited.

    `target` is the name of a Serve application or any handle whose `score_groups` and `info` answer
    `.remote()`, a `RewardScorerActor` for one.
    """

    def __init__(self, target: Any = DEFAULT_APP_NAME, *, timeout_s: float = 120.0) -> None:
        self._handle = _app_handle(target) if isinstance(target, str) else target
        self._timeout_s = timeout_s

    async def score(self, prompt: Prompt, completions: Sequence[str]) -> GroupScores:
        """The scores of one prompt's completions."""
        return (await self.score_groups([Group(prompt, completions)]))[0]

    async def score_groups(
        self, groups: Sequence[Group], token_rewards: bool = False
    ) -> list[GroupScores]:
        scores = await self._call(self._handle.score_groups, list(groups), token_rewards)
        return cast("list[GroupScores]", scores)

    async def info(self) -> schema.Info:
        return cast("schema.Info", await self._call(self._handle.info))

    async def _call(self, method: Any, *arguments: Any) -> Any:
        deadline = time.monotonic() + self._timeout_s
        attempt = 0
        while True:
            try:
                async with asyncio.timeout(max(0.1, deadline - time.monotonic())):
                    return await method.remote(*arguments)
            except _FAILURES as error:
                await asyncio.sleep(pause_s(_as_service_error(error), attempt, deadline))
            attempt += 1
