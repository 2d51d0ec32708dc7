"""From the figures of every round to targets and tables of the rollout benchmark."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.common.report import too_noisy
from benchmarks.serving.report import Figures, markdown

_COLUMNS = {
    "seconds": "s",
    "sampling_s": "sampling s",
    "scoring_s": "scoring s",
    "prompts_per_s": "prompts/s",
    "ms_alone": "ms alone",
    "driver_core": "driver's core",
}


def targets(figures: Figures) -> list[dict[str, Any]]:
    """Every target that was measured, from ratios within a round: median, goal, whether it is met.
    A ratio without a goal is there to be compared."""
    found: list[dict[str, Any]] = []

    def add(what: str, values: list[float], goal: float | None, *, at_least: bool = False) -> None:
        value = statistics.median(values)
        row: dict[str, Any] = {"what": what, "value": value, "goal": None, "is_met": None}
        if goal is not None:
            row["goal"] = f"at {'least' if at_least else 'most'} {goal:g}"
            row["is_met"] = value >= goal if at_least else value <= goal
        found.append({**row, "rounds": values})

    for name in ("overlap", "overlap-simulated"):
        if name in figures:
            overlapped = _rounds(figures, name, "overlapped", "seconds")
            in_turn = figures[name]["one after the other"]
            phases = [in_turn[phase]["rounds"] for phase in ("sampling_s", "scoring_s")]
            longer = [max(both) for both in zip(*phases, strict=True)]
            add(f"{name}: time over the longer phase's", _over(overlapped, longer), 1.1)
            whole = in_turn["seconds"]["rounds"]
            add(f"{name}: time over both phases'", _over(overlapped, whole), None)
    for over, than in (
        ("handle, token ids", "HTTP, token ids"),
        ("handle, text", "HTTP, text"),
        ("handle, token ids", "handle, text"),
        ("HTTP, token ids", "HTTP, text"),
    ):
        if "transport" in figures:
            pair = (_rounds(figures, "transport", each, "prompts_per_s") for each in (over, than))
            add(f"transport: prompts/s, {over} over {than}", _over(*pair), None)
    for label in figures.get("actors", {}):
        if label != "1":
            several, one = (
                _rounds(figures, "actors", each, "prompts_per_s") for each in (label, "1")
            )
            shares = [ratio / int(label) for ratio in _over(several, one)]
            add(f"{label} actors: share of linear", shares, 0.9, at_least=True)
    for name, by_label in figures.items():
        plain = "vLLM's reload_weights, idle"
        for label in by_label if name.startswith("weights") else ():
            if label != plain:
                pair = (_rounds(figures, name, each, "seconds") for each in (label, plain))
                add(f"{name}: {label} over vLLM's reload", _over(*pair), None)
    return found


def _rounds(figures: Figures, measurement: str, label: str, number: str) -> list[float]:
    values: list[float] = figures[measurement][label][number]["rounds"]
    return values


def _over(values: Sequence[float], others: Sequence[float]) -> list[float]:
    return [value / other for value, other in zip(values, others, strict=True)]


def tables(figures: Figures, met: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a table for each measurement, then the ratios."""
    parts = []
    for measurement, by_label in figures.items():
        columns = [c for c in _COLUMNS if any(c in numbers for numbers in by_label.values())]
        rows = [[measurement, *(_COLUMNS[c] for c in columns), "min..max"]]
        for label, numbers in by_label.items():
            cells = [_shown(numbers[c]["median"]) if c in numbers else "" for c in columns]
            first = numbers[columns[0]]
            rows.append([label, *cells, f"{_shown(first['min'])}..{_shown(first['max'])}"])
        parts.append(markdown(rows))
    rows = [["ratio", "median", "goal", "met"]]
    said: Callable[[bool | None], str] = {True: "yes", False: "no", None: ""}.__getitem__
    rows += [
        [row["what"], f"{row['value']:.2f}", row["goal"] or "", said(row["is_met"])] for row in met
    ]
    return "\n\n".join([*parts, markdown(rows)])


def noisy(figures: Figures) -> list[str]:
    """What spread too far over the rounds to tell: of each variant its first column."""
    return too_noisy(
        {
            f"{measurement}, {label}": next(
                numbers[column]["rounds"] for column in _COLUMNS if column in numbers
            )
            for measurement, by_label in figures.items()
            for label, numbers in by_label.items()
        }
    )


def _shown(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3f}"
