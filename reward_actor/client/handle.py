"""The reward service from inside the Ray cluster: the client's methods without HTTP or JSON.

Calls go through the ingress, so that limits, deadlines and re-issue hold for them, too.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any, cast

from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentResponse

from reward_actor import schema
from reward_actor.cluster import take_loopback_as_it_is
from reward_actor.errors import RewardServiceError, pause_s
from reward_actor.groups import Completion, Group, GroupScores, Prompt, Whole
from reward_actor.ray_internals import route_in_own_loop

DEFAULT_APP_NAME = "rayward"


def _app_handle(app_name: str) -> Any:
    take_loopback_as_it_is()
    try:
        handle = serve.get_app_handle(app_name)
    except RayServeException as error:
        raise ValueError(
            f"no Serve application {app_name!r} runs in this Ray cluster; start it with "
            f"`rayward serve MODEL --ray-address auto` ({error})"
        ) from error
    return route_in_own_loop(handle)


def _as_service_error(error: Exception) -> RewardServiceError:
    """What a failed call means to its caller, in the words that the HTTP client uses."""
    if isinstance(error, RayTaskError):  # the error and, beside it, a traceback of another process
        error = error.cause
    if isinstance(error, RewardServiceError):
        return error
    if isinstance(error, TimeoutError):
        return RewardServiceError("deadline_exceeded", "no scores in time", retryable=True)
    what = type(error).__name__
    return RewardServiceError("unavailable", f"the ingress is gone ({what})", retryable=True)


_FAILURES = (RewardServiceError, TimeoutError, RayActorError, DeploymentUnavailableError)


class RewardHandle:
    """Blocking calls from a driver or a synchronous actor.

    Tries again as `RewardClient` does, until `timeout_s` after the call began; then raises
    RewardServiceError. Raises ValueError at once when no such application runs.
    """

    def __init__(self, app_name: str = DEFAULT_APP_NAME, *, timeout_s: float = 120.0) -> None:
        self._handle = _app_handle(app_name)
        self._timeout_s = timeout_s

    def score(
        self,
        prompt: Prompt,
        completions: Sequence[Completion],
        token_rewards: bool = False,
        turn_rewards: bool = False,
    ) -> GroupScores:
        """The scores of one prompt's completions."""
        return self.score_groups([Group(prompt, completions)], token_rewards, turn_rewards)[0]

    def token_rewards(self, prompt: Prompt, completions: Sequence[Completion]) -> GroupScores:
        """The scores with what each token reads as (`tokens`) and its reward (`token_rewards`)."""
        return self.score(prompt, completions, token_rewards=True)

    def score_groups(
        self,
        groups: Sequence[Group | Whole],
        token_rewards: bool = False,
        turn_rewards: bool = False,
    ) -> list[GroupScores]:
        """The scores of each group. Raises RewardServiceError."""
        wanted = _wanted(token_rewards, turn_rewards)
        scores = self._call(self._handle.score_groups, list(groups), *wanted)
        return cast("list[GroupScores]", scores)

    def info(self) -> schema.Info:
        """What is served, and every limit."""
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
                failure = _as_service_error(error)
            time.sleep(pause_s(failure, attempt, deadline))
            attempt += 1


class AsyncRewardHandle:
    """`RewardHandle` for an asynchronous actor: the same methods, awaited.

    `target` is the name of a Serve application or any handle whose `score_groups` and `info` answer
    `.remote()`, a `RewardScorerActor` for one.
    """

    def __init__(self, target: Any = DEFAULT_APP_NAME, *, timeout_s: float = 120.0) -> None:
        self._handle = _app_handle(target) if isinstance(target, str) else target
        self._timeout_s = timeout_s

    async def score(
        self,
        prompt: Prompt,
        completions: Sequence[Completion],
        token_rewards: bool = False,
        turn_rewards: bool = False,
    ) -> GroupScores:
        """The scores of one prompt's completions."""
        groups = [Group(prompt, completions)]
        return (await self.score_groups(groups, token_rewards, turn_rewards))[0]

    async def token_rewards(self, prompt: Prompt, completions: Sequence[Completion]) -> GroupScores:
        """The scores with what each token reads as (`tokens`) and its reward (`token_rewards`)."""
        return await self.score(prompt, completions, token_rewards=True)

    async def score_groups(
        self,
        groups: Sequence[Group | Whole],
        token_rewards: bool = False,
        turn_rewards: bool = False,
    ) -> list[GroupScores]:
        """The scores of each group. Raises RewardServiceError."""
        wanted = _wanted(token_rewards, turn_rewards)
        scores = await self._call(self._handle.score_groups, list(groups), *wanted)
        return cast("list[GroupScores]", scores)

    async def info(self) -> schema.Info:
        """What is served, and every limit."""
        return cast("schema.Info", await self._call(self._handle.info))

    async def _call(self, method: Any, *arguments: Any) -> Any:
        deadline = time.monotonic() + self._timeout_s
        attempt = 0
        while True:
            response = method.remote(*arguments)
            try:
                async with asyncio.timeout(max(0.1, deadline - time.monotonic())):
                    return await response
            except asyncio.CancelledError:
                _cancel(response)
                raise
            except _FAILURES as error:
                _cancel(response)
                failure = _as_service_error(error)
            await asyncio.sleep(pause_s(failure, attempt, deadline))
            attempt += 1


def _wanted(token_rewards: bool, turn_rewards: bool) -> tuple[bool, ...]:
    """Arguments of `score_groups`, which in an older service has one."""
    return (token_rewards, True) if turn_rewards else (token_rewards,)


def _cancel(response: Any) -> None:
    """Nobody waits for it any more. What a plain actor has begun it ends."""
    if isinstance(response, DeploymentResponse):
        response.cancel()
