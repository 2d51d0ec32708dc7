"""The two Ray deployments, thin: what they do is in `serve.ingress` and `serve.replica`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from ray import serve

from reward_actor import schema
from reward_actor.errors import RewardServiceError
from reward_actor.groups import Group, GroupScores, Whole
from reward_actor.ray_internals import logs_dir, serve_http_options
from serve.api import build_api
from serve.config import ServeConfig
from serve.current_model import CurrentModel, Sleep
from serve.http.auth import require_guard
from serve.ingress.service import RewardService
from serve.ingress.swap import Swapper
from serve.monitoring.metrics import Recorder
from serve.replica.models import LoadedModels
from serve.replica.replica import Replica, load_scorer

if TYPE_CHECKING:
    from fastapi import FastAPI
    from ray.serve.handle import DeploymentHandle

# A model that is not current any more serves the requests that were rendered for it.
_RETIRE_AFTER_S = 30.0


# What bounds the requests of an ingress is its own limit, which answers 429 and says until when.
@serve.deployment(name="Ingress", max_ongoing_requests=100_000)
@serve.ingress()
class Ingress:
    """Checks limits, renders and tokenises; one `RewardService` behind every route and handle."""

    def __init__(
        self, config: ServeConfig, start: str, reward_model: DeploymentHandle[Any]
    ) -> None:
        """start: of the application, which tells it from one before with the same name."""
        # Where Serve listens is not decided here: `serve run` and `serve deploy` do that, too.
        # An ingress has a share of one core; several threads only cost it (a third more, measured).
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        require_guard(serve_http_options().host, config)
        context = serve.get_replica_context()
        name = context.replica_id.unique_id
        self._service = RewardService(
            config,
            reward_model,
            context.app_name,
            name,
            # Alongside the logs of Ray Serve, where Ray's own tools look for them.
            logs_dir() / "serve" / f"rayward_requests_{name}.jsonl",
        )
        self._swapper = Swapper(
            self._service.replicas,
            context.app_name,
            config,
            start,
            self._service.functions,
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_api(self._service, self._swapper)

    async def score_groups(
        self,
        groups: Sequence[Group | Whole],
        token_rewards: bool = False,
        turn_rewards: bool = False,
    ) -> list[GroupScores]:
        """Score groups before the deadline. Raises RewardServiceError."""
        try:
            scored = await self._service.score(
                groups, token_rewards=token_rewards, turn_rewards=turn_rewards
            )
            return scored.results
        except RewardServiceError as error:
            self._service.observer.refused(error.type)  # those over HTTP are counted there
            raise

    async def info(self) -> schema.Info:
        """What is served. Raises RewardServiceError while no replica is ready."""
        return await self._service.info()

    async def sleep(self) -> schema.SleepReply:
        """Let every replica give its weights' memory back. Raises RewardServiceError."""
        return await self._swapper.sleep()

    async def wake(self) -> schema.SleepReply:
        """Score again. Raises RewardServiceError."""
        return await self._swapper.wake()


# Ray's own default bounds requests in flight; here tokens do.
@serve.deployment(name="RewardModel", max_ongoing_requests=10_000)
class RewardModel(Replica):
    """Loads the model, replays its golden samples, then scores flat token ids in batches."""

    def __init__(self, config: ServeConfig, start: str) -> None:
        """start: as the ingress has it."""
        import torch

        num_replicas = config.max_replicas or config.num_replicas
        num_threads = config.threads_per_replica or max(1, (os.cpu_count() or 1) // num_replicas)
        torch.set_num_threads(num_threads)
        context = serve.get_replica_context()
        app_name, model = context.app_name, config.model
        current = CurrentModel.at_start(app_name, model)
        sleep = Sleep.get(app_name, start)
        models = LoadedModels(
            current.directory,
            current.generation,
            current.name or config.name,
            partial(load_scorer, config),
            _RETIRE_AFTER_S,
            None if sleep is None else sleep.version_of(current.generation),
        )
        models.generation = current.take_over(app_name, model).generation
        super().__init__(
            config,
            context.replica_id.unique_id,
            models,
            Recorder(),
            partial(CurrentModel.get, app_name),
            lambda: Sleep.get(app_name, start) is not None,
            num_threads,
        )
