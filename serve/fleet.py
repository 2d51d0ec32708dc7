"""What an ingress knows of the replicas: their model, their number, and how to reach them.

The Ray side of `serve.dispatch`.
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
from reward_actor.render import Renderer
from reward_actor.tokenizer import load_like
from serve.dispatch import ReplicaLost
from serve.wire import Description, FlatSequences, ReplicaReply

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

logger = logging.getLogger("ray.serve")

# How often the replicas are counted, and how long they may take to answer that.
_REFRESH_S = 2.0
_ANSWER_S = 2.0
# Before the replicas are asked again, when none could answer.
_PAUSE_S = 0.05

_LOST = (RayActorError, DeploymentUnavailableError, BackPressureError)


@dataclass(frozen=True)
class Model:
    """The model that the replicas hold, and how to render for it."""

    description: Description
    contract: ScoringContract
    renderer: Renderer

    @property
    def version(self) -> str:
        return self.description.model_version

    @property
    def generation(self) -> int:
        return self.description.generation

    def tokens(self, ids: Rendered) -> list[str] | None:
        """What each token reads as, by itself; None for a sample that was not rendered."""
        if isinstance(ids, SampleError):
            return None
        return [str(self.renderer.tokenizer.decode([i])) for i in ids]


class Fleet:
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
        self._asked = 0.0
        self._lock = asyncio.Lock()
        self._watcher: asyncio.Task[None] | None = None
        self.descriptions: list[Description] = []

    @property
    def _handle(self) -> DeploymentHandle[Any]:
        """Routes in this loop: a loop of its own would cost a hop of threads in each direction."""
        handle = self._uninitialised
        if not handle.is_initialized:
            handle._init(_run_router_in_separate_loop=False)
        return handle

    async def send(self, message: FlatSequences, token_scores: bool) -> ReplicaReply:
        """The reply of some replica. Raises ReplicaLost."""
        response = self._handle.score.remote(message, token_scores, self._sender)
        try:
            reply: ReplicaReply = await response
        except asyncio.CancelledError:
            response.cancel()  # or the replica would score for callers who have gone
            raise
        except _LOST as error:
            raise ReplicaLost from error
        return reply

    async def model(self, *, newer_than: int = -1) -> Model:
        """The current model, of a generation above `newer_than`. Waits for it."""
        while self._model is None or self._model.generation <= newer_than:
            await self.refresh()
            if self._model is None or self._model.generation <= newer_than:
                await asyncio.sleep(_PAUSE_S)
        return self._model

    async def ask_all(self, method: str, *arguments: Any, timeout_s: float) -> list[Any]:
        """What every live replica answers; an exception in place of an answer that did not come."""
        try:
            response = self._handle.broadcast(method, *arguments)
            answers: list[Any] = await response.results_async(
                timeout_s=timeout_s, return_exceptions=True
            )
        except (TimeoutError, *_LOST) as error:
            return [error]
        return answers

    async def refresh(self) -> Model | None:
        """Ask the replicas what they hold; None while none answers. The model of the highest
        generation counts: the others are about to follow."""
        asked = time.monotonic()
        async with self._lock:
            if asked < self._asked:  # somebody else has asked meanwhile
                return self._model if self.descriptions else None
            found = await self._describe()
            self._asked = time.monotonic()
            self.descriptions = found
            self._on_refresh(found)
            if not found:
                return None
            newest = max(found, key=lambda description: description.generation)
            if self._model is None or self._model.generation < newest.generation:
                self._model = await asyncio.to_thread(self._load, newest)
            return self._model

    def watch(self) -> None:
        """Keep what is known of the replicas up to date, from now on."""
        if self._watcher is None:
            self._watcher = asyncio.get_running_loop().create_task(self._watch())

    async def _watch(self) -> None:
        while True:
            try:
                await self.refresh()
            except Exception as error:
                logger.warning("the replicas could not be asked: %s", type(error).__name__)
            await asyncio.sleep(_REFRESH_S)

    async def _describe(self) -> list[Description]:
        answers = await self.ask_all("describe", timeout_s=_ANSWER_S)
        found = [answer for answer in answers if isinstance(answer, Description)]
        if not found and self._model is None:
            # None is there yet; unlike a broadcast, a request makes a service at zero scale up.
            try:
                found = [await self._handle.describe.remote()]
            except _LOST:
                return []
        return found

    def _load(self, description: Description) -> Model:
        tokenizer = load_like(
            Path(description.directory),
            description.tokenizer,
            trust_remote_code=self._trust_remote_code,
        )
        contract = ScoringContract.from_json(description.contract)
        return Model(description, contract, Renderer(tokenizer, contract))
