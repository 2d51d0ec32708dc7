"""Hot swaps and sleep.

A swap: every replica loads the candidate alongside its model, and only then all go over to it.

A candidate that one replica refuses is refused: nothing has changed then, anywhere. Sleep: it is
remembered by the cluster first, so that what starts meanwhile does the same; where one replica
cannot sleep or wake, all stay as they were.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

from ray.exceptions import RayActorError

from reward_actor import schema
from reward_actor.errors import RewardServiceError
from serve.config import ServeConfig
from serve.current_model import CurrentModel, Sleep, wake_up
from serve.ingress.functions import Functions
from serve.ingress.replicas import Replicas
from serve.ingress.tasks import detached
from serve.registry import Registry
from serve.wire import Description

Reply = TypeVar("Reply", bound=schema.Wire)

logger = logging.getLogger("ray.serve")

_ANSWER_S = 10.0
# What a replica that was not reached takes until it has looked for itself.
_FOLLOW_S = 10.0


class Swapper:
    """The swaps of one ingress, and its sleep; they take turns."""

    def __init__(
        self,
        replicas: Replicas,
        app_name: str,
        config: ServeConfig,
        start: str = "",
        functions: Functions | None = None,
    ) -> None:
        """config: what the service was started with; start: tells it from one before with the same
        name; functions: whose names no model may have. Raises ValueError for its registry."""
        self._replicas = replicas
        self._app_name = app_name
        self._config = config
        self._start = start
        self._functions = functions
        self._registry = None if config.registry is None else Registry(config.registry)
        self._task: asyncio.Task[Any] | None = None

    @property
    def registry(self) -> Registry:
        """Raises RewardServiceError where the service was started without one."""
        if self._registry is None:
            raise RewardServiceError(
                "not_found", "this service has no registry; start it with --registry DIRECTORY"
            )
        return self._registry

    async def names(self) -> schema.RegistryReply:
        """Raises RewardServiceError."""
        names = await asyncio.to_thread(self.registry.names)
        current = await asyncio.to_thread(CurrentModel.get, self._app_name)
        name = (current.name if current else "") or self._config.name
        return schema.RegistryReply(models=names, current=name)

    async def swap(self, name: str) -> schema.SwapReply:
        """Serve another model of the registry from now on.

        A caller who hangs up does not stop it half way. Replicas that did not go over in time are
        not counted in the reply; they follow by themselves.

        Raises RewardServiceError: "not_found" for a name that the registry has not,
        "model_refused" for a model that a replica does not accept, "unavailable" while another
        swap is under way or when no replica went over in time (they will follow).
        """
        return await self._in_turn(self._swap(name))

    async def sleep(self) -> schema.SleepReply:
        """Let every replica give its weights' memory back, once it has scored what it had.

        Raises RewardServiceError: "unavailable" while a swap is under way; and all stay awake:
        "model_refused" when a replica cannot, "unavailable" when one did not answer.
        """
        return await self._in_turn(self._sleep())

    async def wake(self) -> schema.SleepReply:
        """Score again, on every replica.

        Raises RewardServiceError as `sleep` does, and all sleep on.
        """
        return await self._in_turn(self._wake())

    async def _in_turn(self, work: Coroutine[Any, Any, Reply]) -> Reply:
        if self._task is not None and not self._task.done():
            work.close()
            raise RewardServiceError(
                "unavailable",
                "another swap is under way, or the service falls asleep or wakes",
                retryable=True,
                retry_after_s=1.0,
            )
        task = self._task = detached(work)
        return await asyncio.shield(task)

    async def _sleep(self) -> schema.SleepReply:
        model = await self._replicas.refresh()
        to = Sleep(0, "") if model is None else Sleep(model.generation, model.version)
        return await self._change("sleep", to, undo="wake")

    async def _wake(self) -> schema.SleepReply:
        return await self._change("wake", None, undo="sleep")

    async def _change(self, method: str, to: Sleep | None, *, undo: str) -> schema.SleepReply:
        started = time.monotonic()
        before = await asyncio.to_thread(Sleep.get, self._app_name, self._start)
        is_change = (before is None) != (to is None)
        if is_change:
            await asyncio.to_thread(self._remember, to)
        try:
            states = await self._tell(method)
        except RewardServiceError:
            if is_change:
                await asyncio.to_thread(self._remember, before)
                await self._replicas.ask_all(undo, timeout_s=self._config.swap_timeout_s)
            raise
        await self._replicas.refresh()
        seconds = time.monotonic() - started
        logger.warning("%s after %.1f s (%d replicas)", method, seconds, len(states))
        return schema.SleepReply(asleep=to is not None, seconds=seconds, replicas=states)

    def _remember(self, sleep: Sleep | None) -> None:
        if sleep is None:
            wake_up(self._app_name, self._start)
        else:
            sleep.set(self._app_name, self._start)

    async def _tell(self, method: str) -> list[schema.ReplicaState]:
        """What the replicas say. Raises RewardServiceError.

        One that has died since is replaced by one that knows already.
        """
        answers = await self._replicas.ask_all(method, timeout_s=self._config.swap_timeout_s)
        states = [answer for answer in answers if isinstance(answer, schema.ReplicaState)]
        failed = [f"replica {each.replica}: {each.error}" for each in states if each.error]
        if failed:
            message = f"{len(failed)} of {len(states)} replicas could not {method}: "
            raise RewardServiceError("model_refused", message + "; ".join(failed))
        is_silent = any(not isinstance(a, schema.ReplicaState | RayActorError) for a in answers)
        if is_silent or (answers and not states):  # the latter where none could be asked
            raise RewardServiceError(
                "unavailable", f"a replica was told to {method} and did not answer", retryable=True
            )
        return states

    async def _swap(self, name: str) -> schema.SwapReply:
        try:
            directory = str(await asyncio.to_thread(self.registry.directory, name))
        except ValueError as error:
            raise RewardServiceError("not_found", str(error)) from None
        try:
            version, generation = await self._decide(name, directory)
        except Exception:
            await self._replicas.ask_all("discard_candidate", timeout_s=_ANSWER_S)
            raise
        return await self._activate(name, version, generation)

    async def _decide(self, name: str, directory: str) -> tuple[str, int]:
        """The version and generation of the model, once every replica has it and the cluster
        remembers it: a replica that starts from here on loads it, and one that was not asked
        follows by itself."""
        prepared = await self._prepare(directory)
        [version] = {description.model_version for description in prepared}
        generation = 1 + max(description.generation for description in prepared)
        current = CurrentModel(generation, directory, name, base=self._config.model)
        if not await asyncio.to_thread(current.set, self._app_name):
            raise RewardServiceError(
                "unavailable", "another swap was faster", retryable=True, retry_after_s=1.0
            )
        return version, generation

    async def _prepare(self, directory: str) -> list[Description]:
        timeout_s = self._config.swap_timeout_s
        answers = await self._replicas.ask_all("prepare", directory, timeout_s=timeout_s)
        for answer in answers:
            if isinstance(answer, str):
                # A message of the loader names files; the caller knows the model by its name.
                reason = answer.replace(directory, "the model")
                raise RewardServiceError("model_refused", reason)
        prepared = [answer for answer in answers if isinstance(answer, Description)]
        if len(prepared) < len(answers) or not prepared:
            raise RewardServiceError(
                "unavailable", "a replica did not answer; nothing was changed", retryable=True
            )
        versions = {description.model_version for description in prepared}
        if len(versions) > 1:
            raise RewardServiceError(
                "model_refused",
                "the replicas read different files under that name; is the registry shared?",
            )
        if self._functions is not None:
            try:
                self._functions.require_other_names(prepared[0].readout.named)
            except ValueError as error:
                raise RewardServiceError("model_refused", str(error)) from None
        return prepared

    async def _activate(self, name: str, version: str, generation: int) -> schema.SwapReply:
        swap = version, generation, name
        answers = await self._replicas.ask_all("activate", *swap, timeout_s=_ANSWER_S)
        num_replicas = sum(answer is True for answer in answers)
        logger.warning("generation %d: %s (%d replicas)", generation, version, num_replicas)
        if not num_replicas:
            raise RewardServiceError(
                "unavailable",
                "no replica has gone over to the model in time; they will follow by themselves",
                retryable=True,
                retry_after_s=_FOLLOW_S,
            )
        await self._replicas.refresh()
        return schema.SwapReply(
            model=name, model_version=version, generation=generation, num_replicas=num_replicas
        )
