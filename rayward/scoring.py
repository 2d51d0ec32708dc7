"""What a command that scores shows meanwhile and says at the end, and its exit code."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Self

from reward_actor.terminal import NOT_REDIRECTED, err, note, showing

if TYPE_CHECKING:
    from reward_actor.groups import GroupScores

_NUM_SHOWN = 3


class ScoringProgress:
    """A bar over `total` prompts, of which some are done, with the speed; on a terminal only."""

    def __init__(self, total: int, done: int = 0) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        console = Console(file=err())
        self._bar = Progress(
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("prompts, {task.fields[said]},"),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
            **NOT_REDIRECTED,
        )
        self._task = self._bar.add_task("", total=total, completed=done, said="")
        self._began = time.perf_counter()
        self._num_tokens = 0
        self._rewards: list[float] = []

    @contextmanager
    def shown(self) -> Iterator[Self]:
        with showing(self._bar):
            yield self

    def add(self, scores: GroupScores) -> None:
        """One more prompt is scored."""
        self._num_tokens += sum(scores.num_tokens)
        self._rewards += [reward for reward in scores.rewards if reward is not None]
        self.advance(f"{self._speed:,.0f} tokens/s")

    def advance(self, said: str) -> None:
        """One more prompt is done; what the bar says of them all."""
        self._bar.update(self._task, advance=1, said=said)

    @property
    def _speed(self) -> float:
        return self._num_tokens / (time.perf_counter() - self._began)

    def summary(self) -> str:
        mean = sum(self._rewards) / len(self._rewards) if self._rewards else None
        shown = "" if mean is None else f"mean reward {mean:+.4f}, "
        return f"{shown}{self._num_tokens:,} tokens at {self._speed:,.0f} tokens/s"


def tell_unscored(problems: Sequence[str | None]) -> int:
    """Say on standard error how many completions have no reward, and why; `problems` has a text or
    None for each completion. Returns the exit code: 1 if no completion has a reward, 0 otherwise.
    """
    reasons = Counter(filter(None, problems))
    if not problems:
        note("there is no completion to score")
    if reasons:
        note(f"{reasons.total()} of {len(problems)} have no reward:")
    for text, count in list(reasons.items())[:_NUM_SHOWN]:
        note(f"  {count} x {text}")
    if len(reasons) > _NUM_SHOWN:
        note(f"  and {len(reasons) - _NUM_SHOWN} other reasons")
    return int(reasons.total() == len(problems))
