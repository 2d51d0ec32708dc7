"""The ingress deployment: HTTP and Ray handles in, token ids out to the replicas, rewards back."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray import serve
from ray.serve.context import _get_global_client

from reward_actor import schema
from reward_actor.errors import RewardServiceError
from reward_actor.groups import Group, GroupScores, Whole
from reward_actor.registry import Registry
from serve.api import build_api
from serve.auth import require_guard
from serve.config import ServeConfig
from serve.service import RewardService
from serve.swap import Swapper

if TYPE_CHECKING:
    from fastapi import FastAPI
    from ray.serve.handle import DeploymentHandle


# Serve pickles the class where it is decorated: what it uses must stand above it.
def _log_file(sender: str) -> Path:
    """Beside the logs of Ray Serve, where Ray's own tools look for them."""
    from ray._private.worker import _global_node as node

    assert node is not None, "an ingress runs in a cluster"
    return Path(node.get_logs_dir_path()) / "serve" / f"rayward_requests_{sender}.jsonl"


# What bounds the requests of an ingress is its own limit, which answers 429 and says until when.
@serve.deployment(name="Ingress", max_ongoing_requests=100_000)
@serve.ingress()
class Ingress:
    """Checks limits, renders and tokenises; one `RewardService` behind every route and handle."""

    def __init__(self, config: ServeConfig, reward_model: DeploymentHandle[Any]) -> None:
        # Where Serve listens is not decided here: `serve run` and `serve deploy` do that, too.
        # An ingress has a share of one core; several threads only cost it (a third more, measured).
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        client: Any = _get_global_client()
        require_guard(client.http_config.host, config)
        context = serve.get_replica_context()
        self._service = RewardService(
            config,
            reward_model,
            context.app_name,
            context.replica_id.unique_id,
            _log_file(context.replica_id.unique_id),
        )
        self._swapper = Swapper(
            self._service.fleet,
            context.app_name,
            config.model,
            None if config.registry is None else Registry(config.registry),
            config.swap_timeout_s,
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_api(self._service, self._swapper)

    async def score_groups(
        self, groups: Sequence[Group | Whole], token_rewards: bool = False
    ) -> list[GroupScores]:
        """Score groups before the deadline. Raises RewardServiceError."""
        try:
            return (await self._service.score(groups, token_rewards=token_rewards)).results
        except RewardServiceError as error:
            self._service.observer.refused(error.type)  # those over HTTP are counted there
            raise

    async def info(self) -> schema.Info:
        """What is served. Raises RewardServiceError while no replica is ready."""
        return await self._service.info()
