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
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from reward_actor.errors import RewardServiceError
from reward_actor.scheduling import Rate, Waiting, drop_when_abandoned, halves, wait_for_all
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
# Of so many messages' worth the oldest parts are looked at for those that begin like the first, so
# that the others are passed over a few times at most.
_MESSAGES_AHEAD = 4
# Below this, a share of a request for every replica costs more than it spares.
_MIN_PART = 1024
# When callers of a service that sleeps should ask again.
_ASLEEP_S = 1.0


class ReplicaLost(Exception):
    """The replica that had the message died; another one can have it."""


class OtherVersion(Exception):
    """The replicas have gone on to another model than the sequences were rendered for."""


def asleep() -> RewardServiceError:
    return RewardServiceError(
        "asleep",
        "the service sleeps and scores nothing until it is woken: POST /v1/admin/wake, or wake() "
        "of a client or a handle",
        retryable=True,
        retry_after_s=_ASLEEP_S,
    )


@dataclass(frozen=True)
class Dispatched:
    """Raw scores (n, K) and, if asked for, n arrays (tokens, K); seconds waited and scored, and the
    tokens that were computed for them."""

    raw_scores: Scores
    token_scores: list[Scores] | None
    queue_s: float
    score_s: float
    num_tokens: int


@dataclass(eq=False)
class _Part:
    cut: Cut
    version: str
    generation: int
    token_scores: bool
    done: asyncio.Future[Dispatched]
    submitted: float = field(default_factory=time.monotonic)

    def is_like(self, other: _Part) -> bool:
        return (self.version, self.token_scores) == (other.version, other.token_scores)


class Dispatcher:
    """The queue of one ingress. Use from one event loop.

    num_replicas, max_batch_tokens, is_asleep: what is known of the replicas; set from outside.
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
        self.is_asleep = False
        self.queued_tokens = 0  # on their way, too
        self._waiting: Waiting[_Part] = Waiting(lambda part: part.cut.num_tokens, self._forget)
        self._replica_rate = Rate()
        self._messages: set[asyncio.Task[None]] = set()

    @property
    def tokens_per_s(self) -> float:
        """This ingress's part of what all replicas do together, as last measured."""
        return self._replica_rate.tokens_per_s * max(1, self.num_replicas) / self._num_ingress

    @property
    def message_tokens(self) -> int:
        """As much as a replica scores at once, and in good time."""
        return min(self.max_batch_tokens, self._replica_rate.timely_tokens(self._target_batch_s))

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

        Raises RewardServiceError ("overloaded", "asleep", "internal") and OtherVersion. When one
        part fails or the caller is cancelled, the others are dropped.
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
            self._waiting.add(part)
            self.queued_tokens += part.cut.num_tokens
        self._pump()
        return await wait_for_all([part.done for part in parts])

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

    def _forget(self, part: _Part) -> None:
        self.queued_tokens -= part.cut.num_tokens

    def _pump(self) -> None:
        """Send what waits, as far as the replicas have room for messages."""
        while len(self._messages) < _MESSAGES_PER_REPLICA * max(1, self.num_replicas):
            parts, num_tokens = self._take()
            if not parts:
                return
            task = detached(self._deliver(parts, num_tokens))
            self._messages.add(task)
            task.add_done_callback(self._delivered)
            drop_when_abandoned(parts, task)

    def _take(self) -> tuple[list[_Part], int]:
        """The next message and its tokens: the oldest part, and as many alike as one may hold, but
        no more than one replica's share of what waits."""
        share = -(-self._waiting.size // max(1, self.num_replicas))
        room = min(self.message_tokens, max(_MIN_PART, share))
        oldest = self._waiting.oldest(_MESSAGES_AHEAD * self.message_tokens)
        alike = [part for part in oldest if part.is_like(oldest[0])]
        taken, num_tokens = fitting([part.cut for part in alike], room)
        parts = [alike[i] for i in taken]
        for part in parts:
            self._waiting.remove(part)
        return parts, num_tokens

    def _delivered(self, task: asyncio.Task[None]) -> None:
        self._messages.discard(task)
        self._pump()

    async def _deliver(self, parts: list[_Part], num_tokens: int | None = None) -> None:
        """num_tokens: computed for all parts together; by default none share any."""
        total = sum(part.cut.num_tokens for part in parts)
        num_tokens = total if num_tokens is None else num_tokens
        sequences = [sequence for part in parts for sequence in part.cut.sequences]
        try:
            reply = await self._reply(sequences, num_tokens, parts[0])
        except Exception as error:  # whatever it is belongs to the callers
            is_of_one = isinstance(error, RewardServiceError) and error.type != "asleep"
            if is_of_one and len(parts) > 1:
                await asyncio.gather(*map(self._deliver, halves(parts)))
                return
            for part in parts:
                if not part.done.done():
                    part.done.set_exception(error)
            return
        self._replica_rate.measure(reply.tokens_per_s)
        assert reply.raw_scores is not None, "a reply that is ok carries its scores"
        now = time.monotonic()
        start = 0
        for part in parts:
            end = start + len(part.cut.sequences)
            if not part.done.done():
                tokens = None if reply.token_scores is None else reply.token_scores[start:end]
                queue_s = max(0.0, now - part.submitted - reply.score_s)
                raw = reply.raw_scores[start:end]
                computed = round(part.cut.num_tokens * num_tokens / total)
                part.done.set_result(Dispatched(raw, tokens, queue_s, reply.score_s, computed))
            start = end

    async def _reply(
        self, sequences: list[list[int]], num_tokens: int, like: _Part
    ) -> ReplicaReply:
        """The scores, from whichever replica has them in the end.

        Raises RewardServiceError and OtherVersion; its callers' deadlines end it otherwise.
        """
        message = FlatSequences.of(sequences, like.version, num_tokens, self._waiting.size)
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
            if reply.status == "asleep" and self.is_asleep:
                raise asleep()
            # It has not followed a swap or a wake yet, others fill its queue, or it is about to go.
            await asyncio.sleep(max(_PAUSE_S, reply.retry_after_s))
