"""Hot swaps: every replica loads the candidate beside its model, and only then all go over to it.

A candidate that one replica refuses is refused: nothing has changed then, anywhere.
"""

from __future__ import annotations

import asyncio
import logging

from reward_actor import schema
from reward_actor.errors import RewardServiceError
from serve.config import ServeConfig
from serve.current_model import CurrentModel
from serve.ingress.replicas import Replicas
from serve.ingress.tasks import detached
from serve.registry import Registry
from serve.wire import Description

logger = logging.getLogger("ray.serve")

_ANSWER_S = 10.0
# What a replica that was not reached takes until it has looked for itself.
_FOLLOW_S = 10.0


class Swapper:
    """The swaps of one ingress; they take turns."""

    def __init__(
        self,
        replicas: Replicas,
        app_name: str,
        config: ServeConfig,
    ) -> None:
        """config: what the service was started with. Raises ValueError for its registry."""
        self._replicas = replicas
        self._app_name = app_name
        self._config = config
        self._registry = None if config.registry is None else Registry(config.registry)
        self._task: asyncio.Task[schema.SwapReply] | None = None

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
        if self._task is not None and not self._task.done():
            raise RewardServiceError(
                "unavailable", "another swap is under way", retryable=True, retry_after_s=1.0
            )
        self._task = detached(self._swap(name))
        return await asyncio.shield(self._task)

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
