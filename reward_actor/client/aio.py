"""The HTTP client for asyncio. Neither torch nor ray.

Calls that are made while others are under way travel together: when the event loop comes to it,
what waits is sent, at once while few requests are under way, otherwise as soon as one is done.
Scoring is a pure function, so a request may be sent again, here or elsewhere, until the deadline.
"""

from __future__ import annotations

import asyncio
import copy
import ssl
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from reward_actor import schema
from reward_actor.client import bodies
from reward_actor.client.connection import Sender, Verify, checked_token, proxies, tls
from reward_actor.client.endpoints import parse_urls
from reward_actor.client.merging import PendingGroups, divide, queue, share, take
from reward_actor.errors import RewardServiceError
from reward_actor.groups import Completion, Group, GroupScores, Prompt, Whole
from reward_actor.scheduling import drop_when_abandoned, halves, wait_for_all

if TYPE_CHECKING:
    import httpx

Reply = TypeVar("Reply", bound=schema.Wire)
Result = TypeVar("Result")

# What the service refuses as a whole though only one of its calls may be to blame.
_OF_THE_BODY = ("invalid_request", "body_too_large", "too_many_tokens")
SWAP_TIMEOUT_S = 600.0
"""Of a swap, and of putting a service to sleep and waking it."""


class AsyncRewardClient:
    """Calls a running service, from any event loop: each has its own connections, which end with
    it, or when the client is called from another loop while this one has no call under way.

    urls: one address, several in a list, or several in a string with commas; requests go to each in
    turn, and one that fails is left aside for a while. token: the bearer token, by default
    $RAYWARD_TOKEN. timeout_s: of a call, whatever it takes: connecting, retries and pauses.
    max_concurrency: requests that are under way at once; further calls wait and are merged. verify:
    False, a file of authorities in PEM, or an SSLContext.

    Connection errors, 429 and 5xx are tried again with growing random pauses, or as `Retry-After`
    says; a service that is away is logged, once. Everything else, and what lasts until the
    deadline, raises RewardServiceError. Use it as a context manager or call `close()`.

    Pickled and copied are these arguments: with token=, a pickle is as secret as the token. A copy
    opens its own connections when it is first used, and is open though its original is closed.
    $RAYWARD_TOKEN, a proxy and the file of authorities are those of the process in which it is
    unpickled. TypeError for an SSLContext.
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
        if timeout_s <= 0 or max_concurrency < 1:
            raise ValueError(
                f"timeout_s is {timeout_s} and max_concurrency is {max_concurrency}; both must be "
                "positive"
            )
        self.urls = parse_urls(urls)
        self.timeout_s = timeout_s
        self.max_concurrency = max_concurrency
        self._token = token
        self._verify = verify
        self._make_sender = partial(Sender, checked_token(token), tls(verify), proxies(self.urls))
        # Of _calls and _is_closed, which the threads of several loops change.
        self._lock = threading.RLock()
        self._calls: dict[asyncio.AbstractEventLoop, _Calls] = {}
        self._is_closed = False

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self.urls)})"

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(type(self), **self.arguments()), ()

    def arguments(self) -> dict[str, Any]:
        """Those that make another client like this one, for a pickle. Raises TypeError."""
        if isinstance(self._verify, ssl.SSLContext):
            raise TypeError(
                "a client whose verify is an SSLContext cannot be pickled or copied; give the file "
                "of authorities as verify= instead"
            )
        return {
            "urls": self.urls,
            "token": self._token,
            "timeout_s": self.timeout_s,
            "max_concurrency": self.max_concurrency,
            "verify": self._verify,
        }

    async def score(
        self,
        prompt: Prompt,
        completions: Sequence[Completion],
        token_rewards: bool = False,
        turn_rewards: bool = False,
    ) -> GroupScores:
        """The scores of one prompt's completions."""
        groups = [Group(prompt, completions)]
        return (await self.score_groups(groups, token_rewards, turn_rewards))[0]

    async def token_rewards(self, prompt: Prompt, completions: Sequence[Completion]) -> GroupScores:
        """The scores with what each token reads as (`tokens`) and its reward (`token_rewards`)."""
        return await self.score(prompt, completions, token_rewards=True)

    async def score_groups(
        self,
        groups: Sequence[Group | Whole],
        token_rewards: bool = False,
        turn_rewards: bool = False,
    ) -> list[GroupScores]:
        """The scores of each group, with turn_rewards also at the end of each assistant turn.
        Raises RewardServiceError, and ValueError for groups that no service can be sent.

        Many groups may travel in several requests, which a hot swap can come between: look at
        `model_version`.
        """
        for group in groups:
            bodies.check(group)
        async with self._here() as calls:
            return await calls.score(groups, token_rewards, turn_rewards, self.timeout_s)

    async def check_reachable(self) -> None:
        """Raise RewardServiceError, within five seconds, if nothing answers at any address."""
        async with self._here() as calls:
            await calls.ask(calls.sender.check_reachable())

    async def info(self) -> schema.Info:
        """What is served, and every limit."""
        return await self._ask(schema.Info, "GET", "/info")

    async def models(self) -> schema.RegistryReply:
        """The models that can be swapped in, for a token with the scope for it."""
        return await self._ask(schema.RegistryReply, "GET", "/v1/admin/models")

    async def swap(self, name: str, *, timeout_s: float = SWAP_TIMEOUT_S) -> schema.SwapReply:
        """Serve another model of the registry from now on, for a token with the scope for it.

        Raises ValueError where several addresses could be several services.
        """
        self._require_one_service()
        body = schema.SwapRequest(model=name).model_dump_json().encode()
        path = "/v1/admin/models"
        return await self._ask(schema.SwapReply, "POST", path, body, timeout_s=timeout_s)

    async def sleep(self, *, timeout_s: float = SWAP_TIMEOUT_S) -> schema.SleepReply:
        """Let every replica give its weights' memory back until `wake`, for a token with the scope
        for it. Until then scoring waits, and ends with the error "asleep" at its deadline.

        Raises ValueError as `swap` does.
        """
        self._require_one_service()
        path = "/v1/admin/sleep"
        return await self._ask(schema.SleepReply, "POST", path, timeout_s=timeout_s)

    async def wake(self, *, timeout_s: float = SWAP_TIMEOUT_S) -> schema.SleepReply:
        """Score again. Raises as `sleep` does, and RewardServiceError ("model_refused") where a
        replica cannot: then the service sleeps on."""
        self._require_one_service()
        path = "/v1/admin/wake"
        return await self._ask(schema.SleepReply, "POST", path, timeout_s=timeout_s)

    async def close(self) -> None:
        """End calls that are under way with an error, and the connections."""
        with self._lock:
            self._is_closed = True
            every, self._calls = self._calls, {}
        here = every.pop(asyncio.get_running_loop(), None)
        for loop, calls in every.items():
            if loop.is_running():  # others took their connections along
                _call_in(loop, calls.close_soon)
        if here is not None:
            await here.close()

    async def __aenter__(self) -> AsyncRewardClient:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    def _require_one_service(self) -> None:
        if len(self.urls) > 1:
            raise ValueError(
                f"this client has {len(self.urls)} addresses; change each service by a client of "
                "its own"
            )

    async def _ask(
        self,
        model: type[Reply],
        method: str,
        path: str,
        body: bytes | None = None,
        timeout_s: float | None = None,
    ) -> Reply:
        deadline = time.monotonic() + (timeout_s or self.timeout_s)
        async with self._here() as calls:
            reply = await calls.ask(calls.sender.send(method, path, body, bodies.JSON, deadline))
        try:
            return model.model_validate_json(reply.content, extra="ignore")
        except ValueError:
            raise _strange(reply) from None

    @asynccontextmanager
    async def _here(self) -> AsyncIterator[_Calls]:
        """What belongs to the running loop, for one call."""
        loop = asyncio.get_running_loop()
        with self._lock:
            if self._is_closed:
                raise closed()
            calls = self._calls.get(loop)
            if calls is None:
                for other, theirs in list(self._calls.items()):
                    self._leave(other, theirs)
                forget = partial(self._forget, loop)
                calls = _Calls(self._make_sender(), self.max_concurrency, forget)
                self._calls[loop] = calls
                await calls.open()  # which does not wait
        calls.num_calls += 1
        try:
            yield calls
        finally:
            calls.num_calls -= 1

    def _leave(self, loop: asyncio.AbstractEventLoop, calls: _Calls) -> None:
        """Let go of the connections in a loop that has ended, or has no call under way."""
        if loop.is_running():
            if not calls.num_calls:
                _call_in(loop, self._leave_from_within)
        elif loop.is_closed() or not calls.num_calls:
            self._forget(loop, calls)

    def _leave_from_within(self) -> None:
        """In the loop's own thread, where no call begins meanwhile."""
        loop = asyncio.get_running_loop()
        with self._lock:
            calls = self._calls.get(loop)
            if calls is not None and not calls.num_calls:
                self._forget(loop, calls)
                calls.close_soon()

    def _forget(self, loop: asyncio.AbstractEventLoop, calls: _Calls) -> None:
        with self._lock:
            if self._calls.get(loop) is calls:
                del self._calls[loop]


class _Calls:
    """The calls of a client in one event loop, and the connections, which belong to it."""

    def __init__(
        self, sender: Sender, max_concurrency: int, on_close: Callable[[_Calls], None]
    ) -> None:
        self.sender = sender
        self.num_calls = 0
        self._max_concurrency = max_concurrency
        self._waiting = queue()
        self._requests: set[asyncio.Task[None]] = set()  # of scores
        self._asked: set[asyncio.Task[Any]] = set()  # of anything else
        self._pump_is_due = False
        self._lifetime = self._until_closed(on_close)
        self._closing: asyncio.Task[None] | None = None

    async def score(
        self,
        groups: Sequence[Group | Whole],
        token_rewards: bool,
        turn_rewards: bool,
        timeout_s: float,
    ) -> list[GroupScores]:
        """The scores of checked groups. Raises RewardServiceError."""
        loop = asyncio.get_running_loop()
        deadline = time.monotonic() + timeout_s
        parts: list[PendingGroups] = []
        first = 0
        for some in divide(groups):
            done: asyncio.Future[list[GroupScores]] = loop.create_future()
            parts.append(PendingGroups(some, first, token_rewards, deadline, done, turn_rewards))
            self._waiting.add(parts[-1])
            first += len(some)
        self._pump_soon()
        try:
            async with asyncio.timeout(timeout_s):
                scores = await wait_for_all([part.done for part in parts])
        except TimeoutError:
            failure = next((part.failure for part in parts if part.failure), None)
            raise self.sender.too_late(failure) from None
        return [each for some in scores for each in some]

    async def ask(self, work: Coroutine[Any, Any, Result]) -> Result:
        """The result of what is not merged, unless `close` ends it: RewardServiceError."""
        task = asyncio.get_running_loop().create_task(work)
        self._asked.add(task)
        task.add_done_callback(self._asked.discard)
        try:
            return await task
        except asyncio.CancelledError:
            caller = asyncio.current_task()
            if caller is not None and caller.cancelling():
                raise
            raise closed() from None

    async def open(self) -> None:
        await anext(self._lifetime)

    async def close(self) -> None:
        await self._lifetime.aclose()

    def close_soon(self) -> None:
        self._closing = asyncio.get_running_loop().create_task(self.close())

    async def _until_closed(self, on_close: Callable[[_Calls], None]) -> AsyncGenerator[None]:
        """A generator, since asyncio.run closes those while connections can still be closed."""
        try:
            yield
        finally:
            on_close(self)
            requests = [*self._requests, *self._asked]
            for request in requests:
                request.cancel()
            for part in self._waiting:
                _fail(part, closed())
            try:
                await asyncio.gather(*requests, return_exceptions=True)
            finally:  # asyncio.run cancels this, where it is a task of its own
                await self.sender.close()

    def _pump_soon(self) -> None:
        """Send what waits when all that can run now has run: calls made together go together."""
        if not self._pump_is_due:
            self._pump_is_due = True
            asyncio.get_running_loop().call_soon(self._pump)

    def _pump(self) -> None:
        self._pump_is_due = False
        samples = share(self._waiting.size, self.sender.endpoints.num_ready(time.monotonic()))
        while self._waiting and len(self._requests) < self._max_concurrency:
            parts = take(self._waiting, samples)
            if not parts:
                return
            request = asyncio.get_running_loop().create_task(self._deliver(parts))
            self._requests.add(request)
            request.add_done_callback(partial(self._done, parts))
            drop_when_abandoned(parts, request)

    def _done(self, parts: Sequence[PendingGroups], request: asyncio.Task[None]) -> None:
        self._requests.discard(request)
        if request.cancelled():  # perhaps before it began, or between the halves of a divided one
            for part in parts:
                _fail(part, closed())
        self._pump_soon()

    async def _deliver(self, parts: list[PendingGroups]) -> None:
        try:
            scores = iter(await self._scores(parts))
        except Exception as error:  # whatever it is belongs to the callers
            if len(parts) > 1 and _may_be_one_part(error):
                for half in halves(parts):
                    await self._deliver(half)
                return
            for part in parts:
                _fail(part, error)
            return
        for part in parts:
            results = [next(scores) for _ in part.groups]
            if not part.done.done():
                part.done.set_result(results)

    async def _scores(self, parts: Sequence[PendingGroups]) -> list[GroupScores]:
        groups = [group for part in parts for group in part.groups]
        body, media_type = bodies.encode(groups, parts[0].token_rewards, parts[0].turn_rewards)

        def failed(error: RewardServiceError) -> None:
            for part in parts:
                part.failure = error

        deadline = max(part.deadline for part in parts)
        reply = await self.sender.send("POST", "/v1/score", body, media_type, deadline, failed)
        try:
            media_type = reply.headers.get("Content-Type", "").partition(";")[0]
            return bodies.decode(reply.content, media_type, groups)
        except ValueError:
            raise _strange(reply) from None


def _call_in(loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
    """In the thread of a running loop, unless it ends just now."""
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(callback)


def _may_be_one_part(error: Exception) -> bool:
    """Whether a request was refused for something that only one of its parts may hold."""
    if isinstance(error, RewardServiceError):
        return error.type in _OF_THE_BODY and not error.retryable
    return isinstance(error, (ValueError, TypeError))


def _fail(part: PendingGroups, error: Exception) -> None:
    """Each caller gets an error of its own: they are raised in several places."""
    if part.done.done():
        return
    mine = copy.copy(error)
    if isinstance(mine, RewardServiceError) and mine.index is not None:
        mine.index += part.first
    part.done.set_exception(mine)


def closed() -> RewardServiceError:
    return RewardServiceError("unavailable", "this client is closed")


def _strange(reply: httpx.Response) -> RewardServiceError:
    where = f"{reply.url.scheme}://{reply.url.netloc.decode()}"
    return RewardServiceError(
        "internal",
        f"{where} replied with something else than this client asked for; is it a Rayward service?",
    )
