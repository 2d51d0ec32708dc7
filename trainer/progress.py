"""Shows a running training on the terminal by following its log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from trainer.training_log import read_log

_POLL_S = 0.25
_PLAIN_LINES = 20


def show(path: Path, start: int, num_steps: int, is_running: Callable[[], bool]) -> None:
    """Follow the log from step `start` until `is_running` says no: a live line on a terminal,
    about twenty plain lines elsewhere."""
    console = Console()
    if not console.is_terminal:
        every = max(1, num_steps // _PLAIN_LINES)
        for line in _follow(path, start, is_running):
            if line["step"] % every == 0 or line["step"] in (start + 1, num_steps):
                print(f"step {line['step']}/{num_steps}  {_shown(line)}", flush=True)
        return
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[shown]}"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=num_steps, completed=start, shown="")
        for line in _follow(path, start, is_running):
            progress.update(task, completed=line["step"], shown=_shown(line))


def _follow(path: Path, start: int, is_running: Callable[[], bool]) -> Iterator[dict[str, Any]]:
    """Every step's line once. A restarted worker rewrites the log, so it is read anew, not on."""
    last, stamp, going = start, None, True
    while going:
        going = is_running()  # before reading, so that the last lines are read once more
        now = path.stat().st_mtime_ns if path.exists() else None
        if now != stamp:
            stamp = now
            for line in list(read_log(path)):
                if line["step"] > last:
                    last = line["step"]
                    yield line
        if going:
            time.sleep(_POLL_S)


def _shown(line: dict[str, Any]) -> str:
    return (
        f"loss {line['loss']:.4f}  accuracy {line['accuracy']:.3f}  "
        f"reward_margin {line['reward_margin']:.3f}  {line['pairs_per_s']:.0f} pairs/s"
    )
