"""Shows a running training on the terminal, by following the files that its workers write."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rich.columns import Columns
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from reward_actor.terminal import NOT_REDIRECTED, out, say, showing
from trainer.evaluation.metrics import RMSE
from trainer.log import EVALUATIONS_FILE, LOG_FILE, parsed

_POLL_S = 0.25
_PLAIN_LINES = 20


class Line(NamedTuple):
    """One line of training_log.jsonl (train) or evaluations.jsonl (heldout)."""

    kind: Literal["train", "heldout"]
    values: dict[str, Any]


def show(
    output_dir: Path,
    start: int,
    num_steps: int,
    is_running: Callable[[], bool],
    also: Callable[[Sequence[Line]], None] | None = None,
    console: Console | None = None,
) -> None:
    """Follow a training from step `start` until `is_running` says no: a live display on a
    terminal, about twenty plain lines elsewhere. `also` gets every new line once, too."""
    console = console or Console(file=out())
    live = console.is_terminal
    board = _Board(start, num_steps)
    every = max(1, num_steps // _PLAIN_LINES)
    display = Live(board, console=console, refresh_per_second=4, **NOT_REDIRECTED)
    with showing(display) if live else nullcontext():
        for lines in follow(output_dir, start, is_running):
            for line in lines:
                board.update(line)
                if not live and _is_printed(line, start, num_steps, every):
                    say(plain(line, num_steps))
            if also is not None:
                also(lines)


def follow(
    output_dir: Path, start: int, is_running: Callable[[], bool]
) -> Iterator[tuple[Line, ...]]:
    """The lines that were not there before, each step's once, those of a moment together."""
    log, evaluations = (_Tail(output_dir / name, start) for name in (LOG_FILE, EVALUATIONS_FILE))
    going = True
    while going:
        going = is_running()  # before reading, so that the last lines are read once more
        lines = [Line("train", values) for values in log.read()]
        lines += [Line("heldout", values) for values in evaluations.read()]
        if lines:  # the sort is stable: an evaluation follows its step
            yield tuple(sorted(lines, key=lambda line: int(line.values["step"])))
        if going:
            time.sleep(_POLL_S)


def plain(line: Line, num_steps: int) -> str:
    """One line of text about one line of a log."""
    values, step = line.values, f"step {line.values['step']}/{num_steps}"
    if line.kind == "train":
        return "  ".join([step, *_known(values, _PLAIN)])
    margin = _known(values, {"raw_margin": "raw_margin {:.3f}"})
    return f"{step}  held out: {'  '.join([*_accuracy(values), *margin, *_errors(values)])}"


def _is_printed(line: Line, start: int, num_steps: int, every: int) -> bool:
    step = line.values["step"]
    return line.kind == "heldout" or step % every == 0 or step in (start + 1, num_steps)


_PLAIN = {
    "loss": "loss {:.4f}",
    "accuracy": "accuracy {:.3f}",
    "raw_margin": "raw_margin {:.3f}",
    "pairs_per_s": "{:.0f} pairs/s",
}
_CELLS = {
    "loss": "loss [bold]{:.4f}[/]",
    "accuracy": "accuracy [bold]{:.3f}[/]",
    "raw_margin": "raw margin [bold]{:.3f}[/]",
    "learning_rate": "learning rate [bold]{:.2g}[/]",
    "pairs_per_s": "[bold]{:,.1f}[/] pairs/s",
    "tokens_per_s": "[bold]{:,.0f}[/] tokens/s",
    "padding_saved": "[bold]{:.0%}[/] of padding saved",
    "memory_mb": "[bold]{:,.0f}[/] MB",
}


def _known(values: Mapping[str, Any], formats: Mapping[str, str]) -> list[str]:
    """Those numbers that the line has: what is not defined is absent, or null."""
    return [
        text.format(values[key])
        for key, text in formats.items()
        if isinstance(values.get(key), int | float)
    ]


def _accuracy(values: Mapping[str, Any]) -> list[str]:
    interval = _known(values, {"accuracy_low": "({:.3f}", "accuracy_high": "to {:.3f})"})
    accuracy = _known(values, {"accuracy": "accuracy {:.3f}"})
    return [" ".join([*accuracy, *interval])] if accuracy and len(interval) == 2 else accuracy


def _errors(values: Mapping[str, Any]) -> list[str]:
    names = [key for key in values if key.startswith(RMSE)]
    return [f"{name} {value}" for name in names for value in _known(values, {name: "{:.3f}"})]


class _Tail:
    """The new lines of a file that is appended to, and written anew when a worker restarts; those
    that are no line of a log, which a full disk or a crash may leave, are passed over.

    What is there at first is what an earlier process left: its lines up to `start` are kept by the
    worker, the others are written again.
    """

    def __init__(self, path: Path, start: int) -> None:
        self._path, self._offset, self._last = path, 0, b""
        there = [values["step"] for values in self._appended()]
        self._seen = {step for step in there if step <= start}

    def read(self) -> list[dict[str, Any]]:
        new = [values for values in self._appended() if values["step"] not in self._seen]
        self._seen.update(values["step"] for values in new)
        return new

    def _appended(self) -> list[dict[str, Any]]:
        """The complete lines after the last one that was read, or all if that one has changed."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset - len(self._last))
                data = file.read()
                if not data.startswith(self._last):
                    self._offset, self._last = 0, b""
                    file.seek(0)
                    data = file.read()
        except FileNotFoundError:
            return []
        lines = data[len(self._last) :].splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):
            del lines[-1]  # it is being written
        if lines:
            self._offset += sum(map(len, lines))
            self._last = lines[-1]
        return [values for line in lines if (values := parsed(line)) is not None]


class _Board:
    """What the live display shows: a bar, the newest step, the newest evaluation."""

    def __init__(self, start: int, num_steps: int) -> None:
        self._bar = Progress(
            TextColumn("[bold]training"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("steps,"),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            speed_estimate_period=300,
            expand=True,
        )
        self._task = self._bar.add_task("training", total=num_steps, completed=start)
        self._step: dict[str, Any] | None = None
        self._evaluation: dict[str, Any] | None = None

    def update(self, line: Line) -> None:
        if line.kind == "heldout":
            self._evaluation = line.values
        else:
            self._step = line.values
            self._bar.update(self._task, completed=line.values["step"])

    def __rich__(self) -> Group:
        if self._step is None:
            return Group(self._bar, "  waiting for the first step")
        numbers = Padding(Columns(_known(self._step, _CELLS), padding=(0, 3)), (0, 0, 0, 2))
        if self._evaluation is None:
            return Group(self._bar, numbers)
        values = self._evaluation
        margin = _known(values, {"raw_margin": "raw margin [bold]{:.3f}[/]"})
        found = [f"[bold]{text}[/]" for text in _accuracy(values)] + margin
        found += [escape(text) for text in _errors(values)]
        return Group(self._bar, numbers, f"  held out at step {values['step']}: {', '.join(found)}")
