"""From requests to replicas: cut by tokens, merged into few full messages, sent again when lost.

While every replica has a message that it scores and one that waits for it, what arrives waits here
and goes out together, so that many small requests cost a replica as little as one. Requests that
begin alike (the completions of one prompt, one by one) go together, and their prompt is computed
once. The queue that is bounded is this one; what its callers hang up on is dropped. No Ray in here.

Legend: a part is a cut (`serve.ingress.cutting`) and who waits for it. Tokens are counted as they
are computed, shared prefixes once.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from reward_actor.errors import RewardServiceError
from serve.ingress.cutting import Cut, cut, fitting
from serve.ingress.tasks import detached
from serve.wire import FlatSequences, ReplicaReply

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Scores = NDArray[np.float32]

Send = Callable[[FlatSequences, bool], Awaitable[ReplicaReply]]
"""A message (and whether every token's scores are wanted) to the reply of some replica."""

# One message is scored and one waits, so that the device never does.
_MESSAGES_PER_REPLICA = 2
# Before a message goes out again, after its replica died or was not yet what it should be.
_PAUSE_S = 0.05
# A replica that has not followed a swap by now will not: it is of another deployment.
_FOLLOW_S = 5.0
_FIRST_TOKENS_PER_S = 10_000.0
_RATE_MEMORY = 0.8
# Of so many messages' worth the oldest parts are looked at for those that begin like the first, so
# that the others are passed over a few times at most.
_MESSAGES_AHEAD = 4
# Below this, a share of a request for every replica costs more than it spares.
_MIN_PART = 1024


class ReplicaLost(Exception):
    """The replica that had the message died; another one can have it."""


class OtherVersion(Exception):
    """The replicas have gone on to another model than the sequences were rendered for."""


@dataclass(frozen=True)
class Dispatched:
    """Raw scores (n, K) and, if asked for, n arrays (tokens, K); seconds waited and scored, and the
    tokens that were computed for them."""

    raw_scores: Scores
    token_scores: list[Scores] | None
    queue_s: float
    score_s: float
    num_tokens: int


@dataclass
class _Part:
    cut: Cut
    version: str
    generation: int
    token_scores: bool
    done: asyncio.Future[Dispatched]
    submitted: float = field(default_factory=time.monotonic)
    is_waiting: bool = False

    def is_like(self, other: _Part) -> bool:
        return (self.version, self.token_scores) == (other.version, other.token_scores)


class Dispatcher:
    """The queue of one ingress. Use from one event loop.

    num_replicas, max_batch_tokens: what is known of the replicas; set from outside.
    """

    def __init__(
        self,
        send: Send,
        *,
        max_queued_tokens: int,
        max_queue_s: float,
        target_batch_s: float,
        num_ingress: int = 1,
    ) -> None:
        """num_ingress: those that share the replicas, this one included."""
        self._send = send
        self._max_queued_tokens = max_queued_tokens
        self._max_queue_s = max_queue_s
        self._target_batch_s = target_batch_s
        self._num_ingress = num_ingress
        self.num_replicas = 1
        self.max_batch_tokens = 2**31
        self.replica_tokens_per_s = _FIRST_TOKENS_PER_S
        self.queued_tokens = 0  # on their way, too
        self._waiting: deque[_Part] = deque()
        self._waiting_tokens = 0
        self._num_abandoned = 0  # of those that wait
        self._messages: set[asyncio.Task[None]] = set()

    @property
    def tokens_per_s(self) -> float:
        """This ingress's part of what all replicas do together, as last measured."""
        return self.replica_tokens_per_s * max(1, self.num_replicas) / self._num_ingress

    @property
    def message_tokens(self) -> int:
        """As much as a replica scores at once, and in good time."""
        timely = int(self.replica_tokens_per_s * self._target_batch_s)
        return min(self.max_batch_tokens, max(2 * _MIN_PART, timely))

    async def score(
        self,
        groups: Sequence[list[list[int]]],
        version: str,
        generation: int,
        token_scores: bool = False,
        *,
        is_admitted: bool = False,
    ) -> list[Dispatched]:
        """The parts of one request, in order, scored by the model of this version (and
        generation: a replica behind it follows, one ahead of it may hold it no more).

        is_admitted: it was let in once already, for another version.

        Raises RewardServiceError ("overloaded", "internal") and OtherVersion. When one part fails
        or the caller is cancelled, the others are dropped.
        """
        whole = [Cut.of(group) for group in groups if group]
        total = sum(group.num_tokens for group in whole)
        if not is_admitted:
            self.admit(total)
        share = max(_MIN_PART, -(-total // max(1, self.num_replicas)))
        loop = asyncio.get_running_loop()
        parts = [
            _Part(piece, version, generation, token_scores, loop.create_future())
            for piece in cut(whole, min(share, self.message_tokens))
        ]
        for part in parts:
            self._waiting.append(part)
            self._count_waiting(part, True)
            self.queued_tokens += part.cut.num_tokens
            part.done.add_done_callback(partial(self._forget, part))
        self._pump()
        try:
            return [await part.done for part in parts]
        finally:
            for part in parts:
                if not part.done.cancel() and not part.done.cancelled():
                    part.done.exception()  # seen; asyncio would complain

    def admit(self, num_tokens: int) -> None:
        """Raise RewardServiceError if this would wait too long; an empty queue takes everything."""
        room = min(self._max_queued_tokens, self._max_queue_s * self.tokens_per_s)
        excess = self.queued_tokens + num_tokens - room
        if not self.queued_tokens or excess <= 0:
            return
        wait = max(0.1, min(excess, self.queued_tokens) / self.tokens_per_s)
        raise RewardServiceError(
            "overloaded",
            f"the queue is full; try again in {wait:.1f} s",
            retryable=True,
            retry_after_s=wait,
        )

    def _forget(self, part: _Part, _: asyncio.Future[Dispatched]) -> None:
        self.queued_tokens -= part.cut.num_tokens
        if not part.is_waiting:
            return
        # Its caller has hung up. Such parts go when they come to the front, or when they are many.
        self._count_waiting(part, False)
        self._num_abandoned += 1
        if self._num_abandoned > len(self._waiting) // 2:
            self._waiting = deque(part for part in self._waiting if not part.done.done())
            self._num_abandoned = 0

    def _count_waiting(self, part: _Part, is_waiting: bool) -> None:
        part.is_waiting = is_waiting
        self._waiting_tokens += part.cut.num_tokens if is_waiting else -part.cut.num_tokens

    def _pump(self) -> None:
        """Send what waits, as far as the replicas have room for messages."""
        while len(self._messages) < _MESSAGES_PER_REPLICA * max(1, self.num_replicas):
            parts, num_tokens = self._take()
            if not parts:
                return
            task = detached(self._deliver(parts, num_tokens))
            self._messages.add(task)
            task.add_done_callback(self._delivered)
            self._drop_when_abandoned(parts, task)

    def _take(self) -> tuple[list[_Part], int]:
        """The next message and its tokens: the oldest part, and as many alike as one may hold, but
        no more than one replica's share of what waits."""
        share = -(-self._waiting_tokens // max(1, self.num_replicas))
        room = min(self.message_tokens, max(_MIN_PART, share))
        oldest = self._pop(_MESSAGES_AHEAD * self.message_tokens)
        alike = [part for part in oldest if part.is_like(oldest[0])]
        taken, num_tokens = fitting([part.cut for part in alike], room)
        parts = [alike[i] for i in taken]
        gone = {id(part) for part in parts}
        for part in reversed(oldest):
            if id(part) not in gone:
                self._waiting.appendleft(part)
                self._count_waiting(part, True)
        return parts, num_tokens

    def _pop(self, max_tokens: int) -> list[_Part]:
        """What has waited longest, of so many tokens at most, but for what nobody waits for."""
        found: list[_Part] = []
        while self._waiting and (not found or self._waiting[0].cut.num_tokens <= max_tokens):
            part = self._waiting.popleft()
            if part.is_waiting:
                self._count_waiting(part, False)
                found.append(part)
                max_tokens -= part.cut.num_tokens
            else:
                self._num_abandoned -= 1
        return found

    @staticmethod
    def _drop_when_abandoned(parts: Sequence[_Part], task: asyncio.Task[None]) -> None:
        """Take the message back when the last of its callers has hung up."""
        left = len(parts)

        def one_less(done: asyncio.Future[Dispatched]) -> None:
            nonlocal left
            left -= 1
            if not left and done.cancelled():
                task.cancel()

        for part in parts:
            part.done.add_done_callback(one_less)

    def _delivered(self, task: asyncio.Task[None]) -> None:
        self._messages.discard(task)
        self._pump()

    async def _deliver(self, parts: list[_Part], num_tokens: int) -> None:
        sequences = [sequence for part in parts for sequence in part.cut.sequences]
        try:
            reply = await self._reply(sequences, num_tokens, parts[0])
        except Exception as error:  # whatever it is belongs to the callers
            waiting = [part for part in parts if not part.done.done()]
            if isinstance(error, RewardServiceError) and len(parts) > 1:
                await self._deliver_apart(waiting)
                return
            for part in waiting:
                part.done.set_exception(error)
            return
        before = self.replica_tokens_per_s
        self.replica_tokens_per_s = _RATE_MEMORY * before + (1 - _RATE_MEMORY) * reply.tokens_per_s
        assert reply.raw_scores is not None, "a reply that is ok carries its scores"
        now = time.monotonic()
        share = num_tokens / sum(part.cut.num_tokens for part in parts)
        start = 0
        for part in parts:
            end = start + len(part.cut.sequences)
            if not part.done.done():
                tokens = None if reply.token_scores is None else reply.token_scores[start:end]
                queue_s = max(0.0, now - part.submitted - reply.score_s)
                raw = reply.raw_scores[start:end]
                computed = round(part.cut.num_tokens * share)
                part.done.set_result(Dispatched(raw, tokens, queue_s, reply.score_s, computed))
            start = end

    async def _deliver_apart(self, parts: list[_Part]) -> None:
        """One of them cannot be scored; the others can, without it. By halves, so that nobody waits
        for more than a few messages."""
        middle = (len(parts) + 1) // 2
        await asyncio.gather(
            *(
                self._deliver(half, sum(part.cut.num_tokens for part in half))
                for half in (parts[:middle], parts[middle:])
                if half
            )
        )

    async def _reply(
        self, sequences: list[list[int]], num_tokens: int, like: _Part
    ) -> ReplicaReply:
        """The scores, from whichever replica has them in the end.

        Raises RewardServiceError and OtherVersion; its callers' deadlines end it otherwise.
        """
        message = FlatSequences.of(sequences, like.version, num_tokens, self._waiting_tokens)
        started = time.monotonic()
        while True:
            try:
                reply = await self._send(message, like.token_scores)
            except ReplicaLost:
                await asyncio.sleep(_PAUSE_S)
                continue
            if reply.status == "ok":
                return reply
            if reply.status == "failed":
                raise RewardServiceError("internal", reply.reason, retryable=True)
            is_late = time.monotonic() > started + _FOLLOW_S
            if reply.status == "other_version" and (reply.generation >= like.generation or is_late):
                raise OtherVersion
            # It has not followed a swap yet, others fill its queue, or it is about to go.
            await asyncio.sleep(max(_PAUSE_S, reply.retry_after_s))
