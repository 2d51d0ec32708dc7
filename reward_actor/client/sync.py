"""The HTTP client for code that waits, on an event loop in a thread. Neither torch nor ray."""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import CancelledError, Future
from functools import partial
from types import TracebackType
from typing import Any, TypeVar

from reward_actor import schema
from reward_actor.client.aio import SWAP_TIMEOUT_S, AsyncRewardClient, closed
from reward_actor.client.connection import Verify
from reward_actor.groups import Completion, Group, GroupScores, Prompt, Whole

__all__ = ["AsyncRewardClient", "RewardClient"]

Result = TypeVar("Result")


class RewardClient:
    """`AsyncRewardClient` for code that waits: the same arguments and methods, from any thread.

    Calls of several threads are merged as concurrent ones are there. It is pickled and copied as
    that is: the arguments travel, the thread and the connections do not.
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

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(type(self), **self._client.arguments()), ()

    def score(
        self,
        prompt: Prompt,
        completions: Sequence[Completion],
        token_rewards: bool = False,
        turn_rewards: bool = False,
    ) -> GroupScores:
        """The scores of one prompt's completions."""
        return self.score_groups([Group(prompt, completions)], token_rewards, turn_rewards)[0]

    def token_rewards(self, prompt: Prompt, completions: Sequence[Completion]) -> GroupScores:
        """The scores with what each token reads as (`tokens`) and its reward (`token_rewards`)."""
        return self.score(prompt, completions, token_rewards=True)

    def score_groups(
        self,
        groups: Sequence[Group | Whole],
        token_rewards: bool = False,
        turn_rewards: bool = False,
    ) -> list[GroupScores]:
        """The scores of each group, as `AsyncRewardClient.score_groups`."""
        return self._run(lambda client: client.score_groups(groups, token_rewards, turn_rewards))

    def check_reachable(self) -> None:
        """Raise RewardServiceError, within five seconds, if nothing answers at any address."""
        self._run(lambda client: client.check_reachable())

    def info(self) -> schema.Info:
        """What is served, and every limit."""
        return self._run(lambda client: client.info())

    def models(self) -> schema.RegistryReply:
        """The models that can be swapped in, for a token with the scope for it."""
        return self._run(lambda client: client.models())

    def swap(self, name: str, *, timeout_s: float = SWAP_TIMEOUT_S) -> schema.SwapReply:
        """Serve another model of the registry, as `AsyncRewardClient.swap`."""
        return self._run(lambda client: client.swap(name, timeout_s=timeout_s))

    def sleep(self, *, timeout_s: float = SWAP_TIMEOUT_S) -> schema.SleepReply:
        """Let the replicas give their memory back, as `AsyncRewardClient.sleep`."""
        return self._run(lambda client: client.sleep(timeout_s=timeout_s))

    def wake(self, *, timeout_s: float = SWAP_TIMEOUT_S) -> schema.SleepReply:
        """Score again, as `AsyncRewardClient.wake`."""
        return self._run(lambda client: client.wake(timeout_s=timeout_s))

    def close(self) -> None:
        """End calls that are under way with an error, and the connections."""
        with self._lock:
            self._is_closed = True
            thread, self._thread = self._thread, None
        if thread is not None and thread.is_here:
            thread.submit(self._client.close()).result()
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
            # Under the lock: of a loop that `close` has stopped no result would ever come.
            future = self._thread.submit(call(self._client))
        try:
            return future.result()
        except CancelledError:
            if self._is_closed:  # by another thread, which has stopped the loop under this call
                raise closed() from None
            raise
        finally:  # the caller may have been interrupted
            future.cancel()


class LoopThread:
    """Runs coroutines for any number of threads. The thread is a daemon."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._work, name="reward-client", daemon=True)
        self._thread.start()
        self._pid = os.getpid()

    @property
    def is_here(self) -> bool:
        """False in a process that was forked off: threads stay behind."""
        return self._pid == os.getpid() and not self._loop.is_closed()

    def submit(self, work: Coroutine[Any, Any, Result]) -> Future[Result]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def stop(self) -> None:
        """End the thread and its loop."""
        if self.is_here:
            self._loop.call_soon_threadsafe(self._loop.stop)
            if threading.current_thread() is not self._thread:
                self._thread.join()

    def _work(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
            tasks = asyncio.all_tasks(self._loop)
            for task in tasks:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        finally:
            self._loop.close()
