"""What a call of the reward service can fail with, the same over HTTP and over a Ray handle."""

from __future__ import annotations

import random
import time
from typing import Literal

ErrorType = Literal[
    # of one sample
    "too_long",
    "empty_sequence",
    "token_out_of_vocabulary",
    "unrenderable",
    "non_finite_reward",
    "function_failed",
    # of a whole request
    "invalid_request",
    "body_too_large",
    "too_many_tokens",
    "unauthenticated",
    "forbidden",
    "not_found",
    "model_refused",
    "overloaded",
    "deadline_exceeded",
    "unavailable",
    "asleep",
    "internal",
]

_FIRST_PAUSE_S = 0.1
_MAX_PAUSE_S = 10.0


class RewardServiceError(Exception):
    """A request that got no scores. `type` is one of `ErrorType`.

    index: of the group that is to blame, where the service names one. retry_after_s: when the
    service asks to be asked again.
    """

    def __init__(
        self,
        type: str,
        message: str,
        *,
        retryable: bool = False,
        index: int | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(f"{type}: {message}")
        self.type = type
        self.message = message
        self.retryable = retryable
        self.index = index
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[object, ...]:
        # The default would call __init__ with the formatted message alone.
        return (_rebuild, (self.type, self.message, self.__dict__))


def backoff_s(num_failures: int) -> float:
    """Seconds to wait after so many failures in a row: growing, and random, so that those who
    failed together do not come back together."""
    longest = min(_MAX_PAUSE_S, _FIRST_PAUSE_S * 2 ** min(num_failures, 16))
    return random.uniform(longest / 2, longest)


def pause_s(error: RewardServiceError, attempt: int, deadline: float) -> float:
    """Seconds before attempt `attempt` + 1: growing, random, or as the service asks.

    Raises `error` when it must not be tried again, or not before `deadline` (of time.monotonic).
    """
    pause = error.retry_after_s or backoff_s(attempt)
    if not error.retryable or time.monotonic() + pause >= deadline:
        raise error
    return pause


def _rebuild(type: str, message: str, state: dict[str, object]) -> RewardServiceError:
    error = RewardServiceError(type, message)
    error.__dict__.update(state)
    return error


class EngineDied(RuntimeError):
    """The processes that a scorer runs its model in have ended; this scorer can score no more."""
