"""HTTP clients of the reward service: the same methods, sync and async. Neither torch nor ray."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import CancelledError
from functools import partial
from types import TracebackType
from typing import Any, TypeVar

from reward_actor import schema
from reward_actor.async_client import SWAP_TIMEOUT_S, AsyncRewardClient, closed
from reward_actor.background import LoopThread
from reward_actor.groups import Group, GroupScores, Prompt, Whole
from reward_actor.transport import Verify

__all__ = ["AsyncRewardClient", "RewardClient"]

Result = TypeVar("Result")


class RewardClient:
    """`AsyncRewardClient` for code that waits: the same arguments and methods, from any thread.

    Calls of several threads are merged as concurrent ones are there.
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        *,
        token: str | None = None,
        timeout_s: float = 120.0,
        max_concurrency: int = 8,
        verify: Verify = True,
    ) -> None:
        self._make = partial(
            AsyncRewardClient,
            urls,
            token=token,
            timeout_s=timeout_s,
            max_concurrency=max_concurrency,
            verify=verify,
        )
        self._client = self._make()
        self.urls = self._client.urls
        self.timeout_s = timeout_s
        self._thread: LoopThread | None = None
        self._lock = threading.Lock()
        self._is_closed = False

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self.urls)})"

    def score(
        self, prompt: Prompt, completions: Sequence[str], token_rewards: bool = False
    ) -> GroupScores:
        """The scores of one prompt's completions."""
        return self.score_groups([Group(prompt, completions)], token_rewards)[0]

    def token_rewards(self, prompt: Prompt, completions: Sequence[str]) -> GroupScores:
        """The scores with what each token reads as (`tokens`) and its reward (`token_rewards`)."""
        return self.score(prompt, completions, token_rewards=True)

    def score_groups(
        self, groups: Sequence[Group | Whole], token_rewards: bool = False
    ) -> list[GroupScores]:
        """The scores of each group, as `AsyncRewardClient.score_groups`."""
        return self._run(lambda client: client.score_groups(groups, token_rewards))

    def info(self) -> schema.Info:
        """What is served, and every limit."""
        return self._run(lambda client: client.info())

    def models(self) -> schema.RegistryReply:
        """The models that can be swapped in, for a token with the scope for it."""
        return self._run(lambda client: client.models())

    def swap(self, name: str, *, timeout_s: float = SWAP_TIMEOUT_S) -> schema.SwapReply:
        """Serve another model of the registry, as `AsyncRewardClient.swap`."""
        return self._run(lambda client: client.swap(name, timeout_s=timeout_s))

    def close(self) -> None:
        """End calls that are under way with an error, and the connections."""
        with self._lock:
            self._is_closed = True
            thread, self._thread = self._thread, None
        if thread is not None and thread.is_here:
            thread.run(self._client.close())
            thread.stop()

    def __enter__(self) -> RewardClient:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _run(self, call: Callable[[AsyncRewardClient], Coroutine[Any, Any, Result]]) -> Result:
        with self._lock:
            if self._is_closed:
                raise closed()
            if self._thread is None or not self._thread.is_here:
                if self._thread is not None:  # forked off: the connections are the parent's
                    self._client = self._make()
                self._thread = LoopThread()
                weakref.finalize(self, self._thread.stop)
            thread, client = self._thread, self._client
        try:
            return thread.run(call(client))
        except CancelledError:
            if self._is_closed:  # by another thread, which has stopped the loop under this call
                raise closed() from None
            raise
