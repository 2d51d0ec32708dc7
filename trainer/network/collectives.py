"""What the workers tell each other: every function is called by all of them at once. A process
without others need not have set up a group."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from torch import distributed as dist

T = TypeVar("T")

_MIN_PAUSE_S, _MAX_PAUSE_S = 0.01, 0.5


def is_first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def from_first(value: T) -> T:
    """What the first worker has, on every worker."""
    shared = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(shared, src=0)
    return shared[0]


def from_all(value: T) -> list[T]:
    """What each worker has, by rank, on every worker."""
    if not dist.is_initialized():
        return [value]
    values = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def wait_until(is_so: Callable[[], bool]) -> None:
    """Return when it is so, which all workers must say at the same time. None is silent for long
    meanwhile: a collective that waits for another worker's work has a time limit."""
    pause = _MIN_PAUSE_S
    while not is_so():
        time.sleep(pause)
        pause = min(2 * pause, _MAX_PAUSE_S)
