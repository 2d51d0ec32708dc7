"""What the queues of the client, the ingress and the replica have in common: parts that wait."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

# The rate is unknown until something was scored; a first guess only shapes the first Retry-After.
_FIRST_TOKENS_PER_S = 10_000.0
_RATE_MEMORY = 0.8
_MIN_TIMELY_TOKENS = 2048


class Part(Protocol):
    """What one caller waits for, until it is done."""

    @property
    def done(self) -> asyncio.Future[Any]: ...


P = TypeVar("P", bound=Part)
Result = TypeVar("Result")


class Waiting(Generic[P]):
    """Parts in the order in which they came, each until it is taken or its caller hangs up."""

    def __init__(self, size: Callable[[P], int], on_done: Callable[[P], None]) -> None:
        """on_done: called for each part that was added once it is done, taken or not."""
        self._size_of = size
        self._on_done = on_done
        self._parts: OrderedDict[P, int] = OrderedDict()
        self.size = 0

    def __len__(self) -> int:
        return len(self._parts)

    def __iter__(self) -> Iterator[P]:
        return (part for part in self._parts if not part.done.done())

    def add(self, part: P) -> None:
        self._parts[part] = size = self._size_of(part)
        self.size += size
        part.done.add_done_callback(partial(self._done, part))

    def _done(self, part: P, _: asyncio.Future[Any]) -> None:
        self.remove(part)
        self._on_done(part)

    def remove(self, part: P) -> None:
        """Unless it has left already."""
        self.size -= self._parts.pop(part, 0)

    def oldest(self, size: int) -> list[P]:
        """What has waited longest, of so much together at most, but the first in any case."""
        found: list[P] = []
        for part in self:
            if found and self._parts[part] > size:
                break
            found.append(part)
            size -= self._parts[part]
        return found


async def wait_for_all(futures: Sequence[asyncio.Future[Result]]) -> list[Result]:
    """Their results, in order. If one fails or the caller is cancelled, the others are dropped."""
    try:
        return [await future for future in futures]
    finally:
        for future in futures:
            if not future.cancel() and not future.cancelled():
                future.exception()  # seen; asyncio would complain


def drop_when_abandoned(parts: Sequence[Part], task: asyncio.Task[None]) -> None:
    """Cancel the task that these parts wait for when the last of their callers has hung up."""
    left = len(parts)

    def one_less(done: asyncio.Future[Any]) -> None:
        nonlocal left
        left -= 1
        if not left and done.cancelled():
            task.cancel()

    for part in parts:
        part.done.add_done_callback(one_less)


def halves(parts: Sequence[P]) -> list[list[P]]:
    """Of a batch that failed what to try again: one of them may be to blame, and the others can go
    without it. By halves nobody waits for more than a few batches."""
    waiting = [part for part in parts if not part.done.done()]
    middle = (len(waiting) + 1) // 2
    return [half for half in (waiting[:middle], waiting[middle:]) if half]


@dataclass
class Rate:
    """How fast a device is, as measured over the last batches."""

    tokens_per_s: float = _FIRST_TOKENS_PER_S

    def measure(self, tokens_per_s: float) -> None:
        self.tokens_per_s = _RATE_MEMORY * self.tokens_per_s + (1 - _RATE_MEMORY) * tokens_per_s

    def timely_tokens(self, target_s: float) -> int:
        """As many as take no longer than they should, but not so few that they waste a device."""
        return max(_MIN_TIMELY_TOKENS, int(self.tokens_per_s * target_s))
