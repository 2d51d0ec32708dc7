"""What a call of the reward service can fail with, the same over HTTP and over a Ray handle."""

from __future__ import annotations


class RewardServiceError(Exception):
    """A request that got no scores. `type` is a word of `reward_actor.schema.ErrorType`."""

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


def _rebuild(type: str, message: str, state: dict[str, object]) -> RewardServiceError:
    error = RewardServiceError(type, message)
    error.__dict__.update(state)
    return error
