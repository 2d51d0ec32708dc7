"""The reward service from inside the Ray cluster: the client's methods without HTTP or JSON.

Calls go through the ingress, so that limits, deadlines and re-issue hold for them, too.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from typing import Any, cast

from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentResponse
from ray.serve.schema import ApplicationStatus

from reward_actor import schema
from reward_actor.client.aio import SWAP_TIMEOUT_S
from reward_actor.cluster import take_loopback_as_it_is
from reward_actor.errors import RewardServiceError, pause_s
from reward_actor.groups import Completion, Group, GroupScores, Prompt, Whole
from reward_actor.ray_internals import route_in_own_loop

logger = logging.getLogger(__name__)

DEFAULT_APP_NAME = "rayward"

_DEPLOYMENTS = {"Ingress", "RewardModel"}
_GONE = (ApplicationStatus.DELETING, ApplicationStatus.DEPLOY_FAILED)
_START = "start one with `rayward serve MODEL --ray-address auto`"
# A call that takes longer looks whether there is anything that could answer it.
_TELL_AFTER_S = 3.0


def _app_handle(app_name: str) -> Any:
    take_loopback_as_it_is()
    try:
        handle = serve.get_app_handle(app_name)
    except RayServeException as error:
        raise ValueError(
            f"no Serve application {app_name!r} runs in this Ray cluster; {_START} ({error})"
        ) from error
    return route_in_own_loop(handle)


def _only_app() -> str:
    """The one application that is a reward service, whatever its name; of several, the one with
    the name that `rayward serve` gives. Raises ValueError."""
    take_loopback_as_it_is()
    names = sorted(
        name
        for name, app in serve.status().applications.items()
        if _DEPLOYMENTS.issubset(app.deployments) and app.status not in _GONE
    )
    if not names:
        raise ValueError(f"no reward service runs in this Ray cluster; {_START}")
    if DEFAULT_APP_NAME in names:
        return DEFAULT_APP_NAME
    if len(names) > 1:
        raise ValueError(
            f"this Ray cluster has {len(names)} reward services; name one of {', '.join(names)}"
        )
    return names[0]


def _tell_who_is_missing(app_name: str | None, deadline: float) -> None:
    """Log what a call waits for, and until when, if the application lacks a replica. None is a
    handle of another kind."""
    if app_name is None:
        return
    try:
        app = serve.status().applications.get(app_name)
    except Exception as error:  # the call itself may well succeed
        missing = f"Ray Serve does not answer ({type(error).__name__})"
    else:
        deployments = {} if app is None else app.deployments
        gone = sorted(name for name in _DEPLOYMENTS if not _num_running(deployments.get(name)))
        if not gone:
            return
        missing = f"application {app_name!r} has no running replica of {' and '.join(gone)}"
    left = deadline - time.monotonic()
    until = time.strftime("%H:%M:%S", time.localtime(time.time() + left))
    logger.warning("%s; waiting for it until %s (%.0f s)", missing, until, left)


def _num_running(deployment: Any) -> int:
    return 0 if deployment is None else deployment.replica_states.get("RUNNING", 0)


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

    Without a name it is that of the cluster's one reward service. Tries again as `RewardClient`
    does, until `timeout_s` after the call began; then raises RewardServiceError. Raises ValueError
    at once when no such application runs.

    Pickled and copied are the application's name and `timeout_s`; a copy looks for the application
    when it is first used, in the cluster where it is.
    """

    def __init__(self, app_name: str | None = None, *, timeout_s: float = 120.0) -> None:
        self._app_name = app_name or _only_app()
        self._timeout_s = timeout_s
        self._handle = _app_handle(self._app_name)

    def __getstate__(self) -> dict[str, Any]:
        return _settings(vars(self))

    @cached_property
    def _handle(self) -> Any:
        return _app_handle(self._app_name)

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

    def sleep(self, *, timeout_s: float = SWAP_TIMEOUT_S) -> schema.SleepReply:
        """Let every replica give its weights' memory back until `wake`. Until then scoring waits,
        and ends with the error "asleep" at its deadline."""
        return cast("schema.SleepReply", self._call(self._handle.sleep, timeout_s=timeout_s))

    def wake(self, *, timeout_s: float = SWAP_TIMEOUT_S) -> schema.SleepReply:
        """Score again. Raises RewardServiceError ("model_refused") where a replica cannot: then the
        service sleeps on."""
        return cast("schema.SleepReply", self._call(self._handle.wake, timeout_s=timeout_s))

    def _call(self, method: Any, *arguments: Any, timeout_s: float | None = None) -> Any:
        deadline = time.monotonic() + (timeout_s or self._timeout_s)
        attempt = 0
        while True:
            response = method.remote(*arguments)
            try:
                return self._result(response, deadline)
            except _FAILURES as error:
                response.cancel()
                failure = _as_service_error(error)
            time.sleep(pause_s(failure, attempt, deadline))
            attempt += 1

    def _result(self, response: Any, deadline: float) -> Any:
        left = max(0.1, deadline - time.monotonic())
        try:
            return response.result(timeout_s=min(left, _TELL_AFTER_S))
        except TimeoutError:
            if left <= _TELL_AFTER_S:
                raise
        _tell_who_is_missing(self._app_name, deadline)
        return response.result(timeout_s=max(0.1, deadline - time.monotonic()))


class AsyncRewardHandle:
    """`RewardHandle` for an asynchronous actor: the same methods, awaited.

    `target` is the name of a Serve application (none: the one reward service), or any handle whose
    `score_groups` and `info` answer `.remote()`, a `RewardScorerActor` for one. Such a handle is
    pickled along, by its own rules.
    """

    def __init__(self, target: Any = None, *, timeout_s: float = 120.0) -> None:
        is_app = target is None or isinstance(target, str)
        self._app_name = target or _only_app() if is_app else None
        self._timeout_s = timeout_s
        self._handle = target if self._app_name is None else _app_handle(self._app_name)

    def __getstate__(self) -> dict[str, Any]:
        return _settings(vars(self))

    @cached_property
    def _handle(self) -> Any:
        assert self._app_name is not None, "any other handle travels along"
        return _app_handle(self._app_name)

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

    async def sleep(self, *, timeout_s: float = SWAP_TIMEOUT_S) -> schema.SleepReply:
        """Let the replicas give their memory back, as `RewardHandle.sleep`."""
        return cast("schema.SleepReply", await self._call(self._handle.sleep, timeout_s=timeout_s))

    async def wake(self, *, timeout_s: float = SWAP_TIMEOUT_S) -> schema.SleepReply:
        """Score again, as `RewardHandle.wake`."""
        return cast("schema.SleepReply", await self._call(self._handle.wake, timeout_s=timeout_s))

    async def _call(self, method: Any, *arguments: Any, timeout_s: float | None = None) -> Any:
        deadline = time.monotonic() + (timeout_s or self._timeout_s)
        loop = asyncio.get_running_loop()
        tell = partial(_tell_who_is_missing, self._app_name, deadline)
        telling = loop.call_later(_TELL_AFTER_S, loop.run_in_executor, None, tell)
        try:
            return await self._result(method, arguments, deadline)
        finally:
            telling.cancel()

    async def _result(self, method: Any, arguments: Sequence[Any], deadline: float) -> Any:
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


def _settings(state: Mapping[str, Any]) -> dict[str, Any]:
    """What of a handle is pickled: not that of an application, which holds connections."""
    is_app = state["_app_name"] is not None
    return {name: value for name, value in state.items() if not (is_app and name == "_handle")}


def _wanted(token_rewards: bool, turn_rewards: bool) -> tuple[bool, ...]:
    """Arguments of `score_groups`, which in an older service has one."""
    return (token_rewards, True) if turn_rewards else (token_rewards,)


def _cancel(response: Any) -> None:
    """Nobody waits for it any more. What a plain actor has begun it ends."""
    if isinstance(response, DeploymentResponse):
        response.cancel()
