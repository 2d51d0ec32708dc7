"""What the protocols of others have in common: lenient requests, strict numbers.

None of them has a place for the error of a single sample, so the first one that cannot be scored
fails its request, with its index, unless `error_reward` is a number that such samples get instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, model_validator

from reward_actor.errors import RewardServiceError
from reward_actor.groups import GroupScores, joined
from serve.http.requests import json_reply
from serve.ingress.service import RewardService, Scored
from serve.protocols.native import check_model

if TYPE_CHECKING:
    from fastapi import Response

T = TypeVar("T")

_TO_TEMPLATES = ("tools", "chat_template_kwargs")

VERSION_HEADER = "Rayward-Model-Version"
"""The header with the model_version, which these replies have no field for."""

ERROR_REWARDS_HEADER = "Rayward-Error-Rewards"
"""The header with the number of samples that got `error_reward`, if any did."""


class DropIn(BaseModel):
    """A request in the words of another system: fields that are not known here are ignored, but for
    those that would change what is scored."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _is_told_nothing(cls, value: Any) -> Any:
        given = value if isinstance(value, dict) else {}
        for name in _TO_TEMPLATES:
            if given.get(name) and name not in cls.model_fields:
                raise ValueError(
                    f"{name} has no place in this protocol; POST /v1/score takes it with a prompt, "
                    "/classify with messages"
                )
        return value


def shape_of(value: Any) -> str:
    """What a field that takes several shapes holds: "text", or by its first element a list of
    "texts", "ids", "rows" (lists) or "objects". For `pydantic.Discriminator`, which unlike a plain
    union tries, and complains of, one shape only."""
    if not isinstance(value, list):
        return "text"
    first = value[0] if value else ""
    if isinstance(first, list):
        return "rows"
    if isinstance(first, dict | BaseModel):
        return "objects"
    return "ids" if isinstance(first, int) else "texts"


def told_apart(body: Any, kinds: Mapping[str, Iterable[str]]) -> str:
    """Which of the protocols on one path a body speaks, by the keys of each.

    Raises RequestValidationError for a body with the keys of none or of several.
    """
    if not isinstance(body, dict):
        raise RequestValidationError([{"loc": ("body",), "msg": "the body must be a JSON object"}])
    found = [name for name, keys in kinds.items() if any(body.get(k) is not None for k in keys)]
    if len(found) == 1:
        return found[0]
    words = "; ".join(f"{name}: {', '.join(keys)}" for name, keys in kinds.items())
    message = f"the body must have the fields of exactly one protocol of this path ({words})"
    raise RequestValidationError([{"loc": ("body",), "msg": message}])


async def check_drop_in_model(service: RewardService, name: str | None) -> None:
    """Raise RewardServiceError ("not_found") for another model than the service's.

    Its directory is taken for its name, too: that is what vLLM and SGLang call a model by default.
    """
    if name != service.config.model:
        await check_model(service, name)


def values(service: RewardService, scored: Scored) -> list[float]:
    """One number a sample, in order: rewards, or raw scores where `drop_in_scores` says so.

    A sample that has none gets `error_reward`; if that is "refuse", the first such one raises
    RewardServiceError, with its index.
    """
    raw = service.config.drop_in_scores == "raw_score"
    found = [v for group in scored.results for v in (group.raw_scores if raw else group.rewards)]
    return _with_error_reward(service, scored, found, lambda value: value)


def token_values(service: RewardService, scored: Scored) -> list[list[float]]:
    """One number for every token of every sample, or `error_reward` alone. Raises
    RewardServiceError as `values` does, and where `drop_in_scores` asks for raw scores: tokens have
    rewards only."""
    if service.config.drop_in_scores == "raw_score":
        raise RewardServiceError(
            "invalid_request",
            "this service answers other systems with raw scores (drop_in_scores), which it has for "
            "whole sequences only; POST /v1/score with token_rewards",
        )
    found = [row for group in scored.results for row in group.token_rewards or []]
    return _with_error_reward(service, scored, found, lambda value: [value])


def _with_error_reward(
    service: RewardService,
    scored: Scored,
    found: Sequence[T | None],
    shaped: Callable[[float], T],
) -> list[T]:
    """What was found for each sample, or `error_reward` in its shape."""
    errors = [error for group in scored.results for error in group.errors]
    substitute = service.config.error_reward
    answered: list[T] = []
    for index, (value, error) in enumerate(zip(found, errors, strict=True)):
        if error is None:
            assert value is not None, "a sample without a reward has an error"
            answered.append(value)
        elif substitute == "refuse":
            message = f"{error.type}: {error.message}"
            raise RewardServiceError("invalid_request", message, index=index)
        else:
            service.observer.error_rewarded(error.type)
            answered.append(shaped(substitute))
    return answered


def num_tokens(results: Iterable[GroupScores]) -> list[int]:
    """The tokens of each sample."""
    return [num for group in results for num in group.num_tokens]


def named_values(service: RewardService, scored: Scored) -> dict[str, list[float]]:
    """The named rewards of each sample, by name, as `values` has its reward, and 0 where a function
    had none; empty where the reward is one."""
    whole = joined(scored.results)
    substitute = service.config.error_reward
    fill = 0.0 if substitute == "refuse" else substitute  # `values` has refused it
    return {
        name: [
            value if value is not None else 0.0 if error is None else fill
            for value, error in zip(values, whole.errors, strict=True)
        ]
        for name, values in (whole.named_rewards or {}).items()
    }


def sigmoid(value: float) -> float:
    """1 / (1 + exp(-value)), for any value."""
    if value >= 0:
        return 1 / (1 + math.exp(-value))
    return math.exp(value) / (1 + math.exp(value))


def drop_in_headers(scored: Scored) -> dict[str, str]:
    """Of a reply in the words of another system: what it has no field for."""
    headers = {VERSION_HEADER: scored.model_version}
    num_errors = sum(error is not None for group in scored.results for error in group.errors)
    if num_errors:  # which got their error_reward, or there would be no reply
        headers[ERROR_REWARDS_HEADER] = str(num_errors)
    return headers


def drop_in_reply(body: Any, scored: Scored) -> Response:
    """JSON in the words of another system."""
    return json_reply(body, drop_in_headers(scored))
