"""What a benchmark of scoring asks of each that it compares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.common.channel import Message

Sequences = Sequence[Sequence[int]]


@dataclass
class Peer:
    """What one child measures.

    score: (workload's name, sequences) -> one reward for each. modes: what is timed, by its name in
    the results, with what goes before it untimed. warm_up: before the first timed run of a
    workload, on a part of it. settings: what a reader must know; may grow with `warm_up`. details:
    what to keep of the last run beside its time. is_elsewhere: it works in processes of its own,
    so that the memory of this one says nothing.
    """

    score: Callable[[str, Sequences], list[float]]
    modes: dict[str, Callable[[], None]]
    settings: dict[str, Any] = field(default_factory=dict)
    warm_up: Callable[[str, Sequences], None] | None = None
    details: Callable[[], Message] = dict
    is_elsewhere: bool = False
