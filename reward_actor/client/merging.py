"""Calls that wait are merged into one request. No network in here.

Legend: a part is what of one call travels together: groups, never a piece of one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from reward_actor.client.bodies import is_ids, weight
from reward_actor.errors import RewardServiceError
from reward_actor.groups import Group, GroupScores, Whole
from reward_actor.scheduling import Waiting

# Of one request: far below what a service accepts by default, and enough to fill its batches.
MAX_SAMPLES = 1024
MAX_WEIGHT = 500_000
# Below this, a request for every endpoint costs more than it spares.
_MIN_SHARE = 32


@dataclass(eq=False)
class PendingGroups:
    """Groups of a call, `first` of which is the place of the first one in the call.

    deadline: the call's, of time.monotonic. failure: of the last attempt, while there are more.
    """

    groups: list[Group | Whole]
    first: int
    token_rewards: bool
    deadline: float
    done: asyncio.Future[list[GroupScores]]
    turn_rewards: bool = False
    failure: RewardServiceError | None = None

    @cached_property
    def num_samples(self) -> int:
        return sum(map(len, self.groups))

    @cached_property
    def weight(self) -> int:
        return sum(map(weight, self.groups))

    @cached_property
    def is_ids(self) -> bool:
        return all(map(is_ids, self.groups))

    def is_like(self, other: PendingGroups) -> bool:
        """Whether both can travel in one request."""
        return self._kind == other._kind

    @property
    def _kind(self) -> tuple[bool, bool, bool]:
        return self.token_rewards, self.turn_rewards, self.is_ids


def queue() -> Waiting[PendingGroups]:
    """Its size is in samples."""
    return Waiting(lambda part: part.num_samples, lambda _: None)


def divide(groups: Sequence[Group | Whole]) -> list[list[Group | Whole]]:
    """The groups of one call, in order, in as few requests as the bounds allow."""
    divided: list[list[Group | Whole]] = []
    num_samples = total = 0
    for group in groups:
        num_samples += len(group)
        total += weight(group)
        if not divided or num_samples > MAX_SAMPLES or total > MAX_WEIGHT:
            divided.append([])
            num_samples, total = len(group), weight(group)
        divided[-1].append(group)
    return divided


def share(num_waiting: int, num_endpoints: int) -> int:
    """Samples of each request, so that every endpoint gets its share of those that wait."""
    return min(MAX_SAMPLES, max(_MIN_SHARE, -(-num_waiting // max(1, num_endpoints))))


def take(waiting: Waiting[PendingGroups], samples: int) -> list[PendingGroups]:
    """Remove the next request's parts: the oldest, and of those like it as many as fit.

    samples: that fit; the oldest part always does.
    """
    room = MAX_WEIGHT
    taken: list[PendingGroups] = []
    for part in waiting:
        if taken and not part.is_like(taken[0]):
            continue
        if taken and (part.num_samples > samples or part.weight > room):
            break
        taken.append(part)
        samples -= part.num_samples
        room -= part.weight
    for part in taken:
        waiting.remove(part)
    return taken
