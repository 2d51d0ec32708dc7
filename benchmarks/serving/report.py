"""From the measurements of every round to medians, targets and tables of the serving benchmark."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.common.report import spread, too_noisy

Runs = Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]
Figures = dict[str, dict[str, dict[str, Any]]]
"""Of each measurement and server: for each number its rounds and their spread; all statuses."""

_COLUMNS = {
    "tokens_per_s": "tokens/s",
    "requests_per_s": "requests/s",
    "p50_ms": "p50 ms",
    "p90_ms": "p90 ms",
    "p99_ms": "p99 ms",
    "max_ms": "max ms",
    "seconds": "seconds",
    "since_kill_s": "since the kill",
}


def summarize(runs: Runs) -> Figures:
    return {
        measurement: {label: _figures(rounds) for label, rounds in by_label.items()}
        for measurement, by_label in runs.items()
    }


def _figures(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for name, value in rounds[0].items():
        if isinstance(value, int | float):
            values = [float(each[name]) for each in rounds]
            figures[name] = {"rounds": values, **spread(values)}
    if "statuses" in rounds[0]:
        total: Counter[str] = Counter()
        for each in rounds:
            total.update(each["statuses"])
        figures["statuses"] = dict(total)
    if "cpu_shares" in rounds[0]:
        figures["cpu_shares"] = [each["cpu_shares"] for each in rounds]
    return figures


def targets(figures: Figures) -> list[dict[str, Any]]:
    """Every target that was measured, for each of our servers: value, goal, whether it is met."""
    found: list[dict[str, Any]] = []

    def add(what: str, label: str, value: float | None, goal: float, *, at_least: bool) -> None:
        if value is not None:
            met = value >= goal if at_least else value <= goal
            sign = "at least" if at_least else "at most"
            row = {"what": what, "server": label, "value": value, "goal": f"{sign} {goal:g}"}
            found.append({**row, "is_met": met})

    def ratio(measurement: str, number: str, label: str, other: str) -> float | None:
        ours = _median(figures, measurement, label, number)
        theirs = _median(figures, measurement, other, number)
        return ours / theirs if ours is not None and theirs else None

    def ours(measurement: str) -> list[str]:
        return [label for label in figures.get(measurement, {}) if label.startswith("ours")]

    for label in ours("groups"):
        value = ratio("groups", "tokens_per_s", label, "vllm")
        add("groups: tokens/s over vLLM's", label, value, 1.5, at_least=True)
    for label in ours("groups_half"):
        for number in ("p50_ms", "p99_ms"):
            value = ratio("groups_half", number, label, "vllm")
            what = f"groups at half load: {number[:3]} over vLLM's"
            add(what, label, value, 1.0, at_least=False)
    for label in ours("singles"):
        for other, goal in (("one_at_a_time", 4.0), ("vllm", 1.3)):
            value = ratio("singles", "tokens_per_s", label, other)
            add(f"singles: tokens/s over {other}'s", label, value, goal, at_least=True)
    for measurement in figures:
        if not measurement.startswith("empty"):
            continue
        for label in ours(measurement):
            if measurement == "empty, 1 client":
                value = _median(figures, measurement, label, "p50_ms")
                add("empty model: p50 ms of a request", label, value, 2.5, at_least=False)
            else:
                value = ratio(measurement, "requests_per_s", label, "plain_ray_serve")
                what = "empty model: requests/s over plain Ray Serve's"
                add(what, label, value, 3.0, at_least=True)
    for label in ours("handle"):
        value = _median(figures, "handle", label, "p50_ms")
        add("empty model: p50 ms of a handle call", label, value, 2.5, at_least=False)
    for label in ours("replica start"):
        value = _median(figures, "replica start", label, "seconds")
        add("replica start to ready, s", label, value, 10.0, at_least=False)
    return found


def _median(figures: Figures, measurement: str, label: str, number: str) -> float | None:
    values = figures.get(measurement, {}).get(label, {}).get(number)
    return None if values is None else float(values["median"])


def tables(figures: Figures, met: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a table for each measurement, then the targets."""
    parts = []
    for measurement, by_label in figures.items():
        columns = [c for c in _COLUMNS if any(c in numbers for numbers in by_label.values())]
        rows = [["server", *(_COLUMNS[c] for c in columns), "spread", "not 200"]]
        for label, numbers in by_label.items():
            cells = [_shown(numbers[c]["median"]) if c in numbers else "" for c in columns]
            first = numbers[columns[0]]
            width = f"{_shown(first['min'])}..{_shown(first['max'])}"
            failed = sum(n for s, n in numbers.get("statuses", {}).items() if s != "200")
            rows.append([label, *cells, width, str(failed)])
        parts.append(f"### {measurement}\n\n{markdown(rows)}")
    if met:
        rows = [["target", "server", "measured", "goal", "met"]]
        rows += [
            [t["what"], t["server"], f"{t['value']:.2f}", t["goal"], "yes" if t["is_met"] else "no"]
            for t in met
        ]
        parts.append(f"### targets\n\n{markdown(rows)}")
    return "\n\n".join(parts)


def noisy(figures: Figures) -> list[str]:
    """What spread too far over the rounds to tell: of each server its first column."""
    return too_noisy(
        {
            f"{label} on {measurement}": next(
                numbers[column]["rounds"] for column in _COLUMNS if column in numbers
            )
            for measurement, by_label in figures.items()
            for label, numbers in by_label.items()
        }
    )


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table whose first row is its head; all columns but the first are numbers."""
    head, *body = rows
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _shown(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"
