"""From the figures of the trainings to tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from benchmarks.serving.report import markdown


def tables(result: Mapping[str, Any]) -> str:
    """Markdown: a table for each part that was measured."""
    parts = {"curves": _curves, "best-of": _best_of, "loop": _loop}
    return "\n\n".join(markdown(parts[name](result[name])) for name in parts if name in result)


def _curves(figures: Mapping[str, Any]) -> list[list[str]]:
    rows = [
        ["", "first ten steps", "last ten", "rise in standard errors", "held-out reward", "grade"]
    ]
    before = figures["before"]
    rows.append(["before", "", "", "", _mean(before["reward"]), _mean(before["grade"])])
    for name, seeds in figures["trainers"].items():
        rises = ", ".join(f"{of_seed['standard_errors']:.1f}" for of_seed in seeds)
        first, last = (fmean(of_seed[end] for of_seed in seeds) for end in ("first", "last"))
        held_out = (
            ", ".join(f"{of_seed['heldout'][what]['mean']:.2f}" for of_seed in seeds)
            for what in ("reward", "grade")
        )
        rows.append([name, f"{first:.2f}", f"{last:.2f}", rises, *held_out])
    return rows


def _best_of(figures: Mapping[str, Any]) -> list[list[str]]:
    sizes = list(figures["rounds"][0]["reward_of_the_best_of"])
    rows = [["round", *(f"best of {n}" for n in sizes), "held-out reward", "grade"]]
    for row, held_out in zip(figures["rounds"], figures["heldout"], strict=True):
        best = [f"{row['reward_of_the_best_of'][n]:.2f}" for n in sizes]
        judged = (_mean(held_out[what]) for what in ("reward", "grade"))
        rows.append([str(row["round"]), *best, *judged])
    return rows


def _loop(figures: Mapping[str, Any]) -> list[list[str]]:
    rows = [["round", "grade, fixed", "reward, fixed", "grade, renewed", "reward, renewed",
             "by the next version", "accuracy of the version", "of the next"]]  # fmt: skip
    by_round = (zip(*figures[name], strict=True) for name in ("fixed", "renewed"))
    for fixed, renewed in zip(*by_round, strict=True):
        numbers = (
            *(_seeds(fixed, name) for name in ("grade", "reward")),
            *(_seeds(renewed, name) for name in ("grade", "reward", "reward_by_the_next")),
            *(_seeds(renewed, name) for name in ("accuracy", "accuracy_of_the_next")),
        )
        rows.append([str(fixed[0]["round"]), *numbers])
    return rows


def _seeds(rows: Sequence[Mapping[str, Any]], name: str) -> str:
    return ", ".join(f"{row[name]['mean']:.2f}" for row in rows)


def _mean(figure: Mapping[str, float]) -> str:
    return f"{figure['mean']:.2f} ± {figure['standard_error']:.2f}"
