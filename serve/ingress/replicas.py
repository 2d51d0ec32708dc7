"""What an ingress knows of the replicas: their model, their number, and how to reach them.

The Ray side of `serve.ingress.dispatch`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from reward_actor.contract import ScoringContract
from reward_actor.groups import Rendered, SampleError
from reward_actor.model.tokenizer import load_like
from reward_actor.ray_internals import broadcast, route_in_this_loop
from reward_actor.render import Renderer
from serve.ingress.dispatch import ReplicaLost, asleep
from serve.ingress.tasks import detached
from serve.wire import Asleep, Description, FlatSequences, ReplicaReply

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

logger = logging.getLogger("ray.serve")

# How often the replicas are counted, and how long they may take to answer that.
_REFRESH_S = 2.0
_ANSWER_S = 2.0
# A replica that did not answer is taken for alive for so long: one turn may be missed.
_KEEP_S = 6.0
# How long the first request waits for a replica; where the service is at zero, it starts one.
_FIRST_S = 10.0
# Before the replicas are asked again, when none could answer.
_PAUSE_S = 0.05
# After so long the replicas hold what they have refused, after all.
_OTHER_S = 2.0

_LOST = (RayActorError, DeploymentUnavailableError, BackPressureError)


@dataclass(frozen=True)
class Model:
    """The model that the replicas hold, and how to render for it."""

    description: Description
    contract: ScoringContract
    renderer: Renderer

    @property
    def name(self) -> str:
        return self.description.name

    @property
    def version(self) -> str:
        return self.description.model_version

    @property
    def generation(self) -> int:
        return self.description.generation

    def is_of(self, description: Description) -> bool:
        theirs = description.model_version, description.generation
        return (self.version, self.generation) == theirs

    def tokens(self, ids: Rendered) -> list[str] | None:
        """What each token reads as, by itself; None for a sample that was not rendered."""
        if isinstance(ids, SampleError):
            return None
        return [str(self.renderer.tokenizer.decode([i])) for i in ids]


class Replicas:
    """The replicas behind one ingress."""

    def __init__(
        self,
        handle: DeploymentHandle[Any],
        sender: str,
        *,
        trust_remote_code: bool,
        on_refresh: Callable[[list[Description]], None],
    ) -> None:
        """on_refresh: called with what the replicas say, whenever they were asked."""
        self._uninitialised = handle
        self._sender = sender
        self._trust_remote_code = trust_remote_code
        self._on_refresh = on_refresh
        self._model: Model | None = None
        self._models: list[Model] = []  # while two are served by turns, neither is loaded again
        self._seen: dict[str, tuple[float, Description]] = {}
        self._asked = 0.0
        self._lock = asyncio.Lock()
        self._watcher: asyncio.Task[None] | None = None
        self.descriptions: list[Description] = []
        self._sleeping: list[Asleep] = []

    @property
    def _handle(self) -> DeploymentHandle[Any]:
        """Routes in this loop, which is there only when the first request is."""
        route_in_this_loop(self._uninitialised)
        return self._uninitialised

    @property
    def num_asleep(self) -> int:
        return len(self._sleeping)

    @property
    def is_asleep(self) -> bool:
        """Whether replicas sleep, and none scores."""
        return self.num_asleep > 0 and not self.descriptions

    async def send(self, message: FlatSequences, token_scores: bool) -> ReplicaReply:
        """The reply of some replica. Raises ReplicaLost."""
        response = self._handle.score.remote(message, token_scores, self._sender)
        try:
            reply: ReplicaReply = await response
        except asyncio.CancelledError:
            response.cancel()  # or the replica would score for callers who have gone
            task = asyncio.current_task()
            if task is None or not task.cancelling():  # Ray has ended the call by itself
                raise ReplicaLost from None
            raise
        except _LOST as error:
            raise ReplicaLost from error
        return reply

    async def model(self, other_than: Model | None = None) -> Model:
        """The current model. Waits for it. Raises RewardServiceError ("asleep").

        other_than: what replicas have refused, so that another one must be there; the same comes
        back if it is all that they hold for a while, as what had refused it may be gone.
        """
        give_up = time.monotonic() + _OTHER_S
        model = self._model
        while model is None or _is_same(model, other_than):
            model = await self.refresh(other_than)
            if self.is_asleep:
                raise asleep()
            if model is not None and time.monotonic() >= give_up:
                return model
            if model is None or _is_same(model, other_than):
                await asyncio.sleep(_PAUSE_S)
        return model

    async def ask_all(self, method: str, *arguments: Any, timeout_s: float) -> list[Any]:
        """What every live replica answers; an exception in place of an answer that did not come."""
        deadline = asyncio.get_running_loop().time() + timeout_s

        async def answer(result: Any) -> Any:
            try:
                async with asyncio.timeout_at(deadline):
                    return await result.get_async()
            except Exception as error:
                return error

        try:
            async with asyncio.timeout_at(deadline):
                results = await broadcast(self._handle, method, *arguments)
        except (TimeoutError, *_LOST) as error:
            return [error]
        return await asyncio.gather(*map(answer, results))

    async def refresh(self, other_than: Model | None = None) -> Model | None:
        """Ask the replicas what they hold; None while none answers. The model of the highest
        generation counts: the others are about to follow. Of several of one generation, as while
        a deployment replaces another, what was current stays so; other_than is the last choice.
        While all sleep, it is what was known last."""
        asked = time.monotonic()
        async with self._lock:
            if asked >= self._asked:  # else somebody has asked meanwhile
                self.descriptions = await self._describe()
                self._asked = time.monotonic()
                self._on_refresh(self.descriptions)
            return await self._choose(other_than)

    async def _choose(self, other_than: Model | None) -> Model | None:
        slept_as = [each.slept_as for each in self._sleeping if each.slept_as is not None]
        known = self.descriptions or slept_as
        if not known:
            return self._model if self.is_asleep else None
        newest = max(description.generation for description in known)
        loaded = [each for each in known if each.generation == newest]
        others = [each for each in loaded if other_than is None or not other_than.is_of(each)]
        for description in others or loaded:
            if self._model is not None and self._model.is_of(description):
                return self._model
        description = (others or loaded)[0]
        found = next((each for each in self._models if each.is_of(description)), None)
        if found is None:
            found = await asyncio.to_thread(self._load, description)
        self._models = [found, *(each for each in self._models if each is not found)][:2]
        self._model = found
        return found

    def watch(self) -> None:
        """Keep what is known of the replicas up to date, from now on."""
        if self._watcher is None:
            self._watcher = detached(self._watch())

    async def _watch(self) -> None:
        while True:
            try:
                await self.refresh()
            except Exception as error:
                logger.warning("the replicas could not be asked: %s", type(error).__name__)
            await asyncio.sleep(_REFRESH_S)

    async def _describe(self) -> list[Description]:
        answers = await self.ask_all("describe", timeout_s=_ANSWER_S)
        if not any(isinstance(a, Description | Asleep) for a in answers) and self._model is None:
            # None is there yet; unlike a broadcast, a request makes a service at zero scale up.
            answers = [*answers, *await self._first()]
        found = [answer for answer in answers if isinstance(answer, Description)]
        self._sleeping = [answer for answer in answers if isinstance(answer, Asleep)]
        for each in self._sleeping:
            self._seen.pop(each.replica, None)
        num_silent = sum(isinstance(answer, TimeoutError) for answer in answers)
        return [*found, *self._silent(found, num_silent)]

    async def _first(self) -> list[Description | Asleep]:
        response = self._handle.describe.remote()
        try:
            async with asyncio.timeout(_FIRST_S):
                return [await response]
        except (asyncio.CancelledError, TimeoutError) as error:
            response.cancel()
            if isinstance(error, TimeoutError):
                return []
            raise
        except _LOST:
            return []

    def _silent(self, found: list[Description], num_silent: int) -> list[Description]:
        """What is known of replicas that are there but did not answer this time. An answer that
        did not come has no name: it is of somebody seen lately, and of those that died there is
        none."""
        now = time.monotonic()
        recent = {name: seen for name, seen in self._seen.items() if now - seen[0] < _KEEP_S}
        for description in found:
            recent.pop(description.replica, None)
        self._seen = recent | {each.replica: (now, each) for each in found}
        latest = sorted(recent.values(), key=lambda seen: seen[0], reverse=True)
        return [description for _, description in latest[:num_silent]]

    def _load(self, description: Description) -> Model:
        tokenizer = load_like(
            Path(description.directory),
            description.tokenizer,
            trust_remote_code=self._trust_remote_code,
        )
        contract = ScoringContract.from_json(description.contract)
        return Model(description, contract, Renderer(tokenizer, contract))


def _is_same(model: Model, other: Model | None) -> bool:
    return other is not None and other.is_of(model.description)
