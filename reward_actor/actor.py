"""A scorer as a Ray actor, for jobs that score without Ray Serve."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError, RayActorError

from reward_actor import schema
from reward_actor.cluster import require_resources
from reward_actor.groups import Group, GroupScores
from reward_actor.info import model_info, model_name
from reward_actor.scorer import RewardScorer


@ray.remote
class RewardScorerActor:
    """Holds one `RewardScorer`. Start with `RewardScorerActor.options(num_gpus=1).remote(path)`."""

    def __init__(self, path: str, **loading: Any) -> None:
        """loading: as `RewardScorer.from_pretrained` takes it."""
        self._name = model_name(path)
        self._scorer = RewardScorer.from_pretrained(path, **loading)

    def score_groups(
        self, groups: Sequence[Group], token_rewards: bool = False, turn_rewards: bool = False
    ) -> list[GroupScores]:
        return self._scorer.score(groups, token_rewards, turn_rewards)

    def info(self) -> schema.Info:
        scorer = self._scorer
        return schema.Info(
            **dict(model_info(scorer)),
            model=self._name,
            limits={
                "max_length": scorer.contract.max_length,
                "max_batch_tokens": scorer.max_batch_tokens,
            },
        )


def is_model_directory(scorer: str) -> bool:
    """Whether it names a directory, not a Serve application. A bare name is that of a folder only
    if a model or a run is in it: `rayward` is an application where this project's source is."""
    path = Path(scorer)
    expected = ("config.json", "adapter_config.json", "ensemble.json", "export")
    holds_one = any((path / name).exists() for name in expected)
    return path.is_dir() and (path.name != scorer or holds_one)


def start_scorer_actor(path: str, num_gpus: float = 0.0) -> Any:
    """A `RewardScorerActor` that has loaded its model. Raises ValueError if the cluster is full or
    the model cannot be loaded."""
    require_resources([{"CPU": 1.0, "GPU": num_gpus} if num_gpus else {"CPU": 1.0}])
    remote: Any = RewardScorerActor
    actor = remote.options(num_cpus=1, num_gpus=num_gpus).remote(str(Path(path).absolute()))
    try:
        ray.get(actor.info.remote())
    except (RayActorError, OutOfMemoryError) as error:  # the latter of Ray's own memory monitor
        if isinstance(error, RayActorError) and error.actor_init_failed:
            raise ValueError(_message_of(error)) from None
        raise ValueError(
            f"the process that was to load {path} as a scorer died; most likely it ran out of "
            "memory: free some, or name a service that runs elsewhere"
        ) from error
    return actor


def _message_of(error: RayActorError) -> str:
    """Of the exception that an actor's constructor raised. Ray keeps the text of its traceback
    alone: indented lines of frames, and then the exception, in one line or several."""
    raised = re.split(r"\n(?=\S)", str(error).rpartition('\n  File "')[2], maxsplit=1)[-1]
    what, _, message = raised.strip().partition(": ")
    return message or what
