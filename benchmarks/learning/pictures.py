"""The curves as PNG files, of equal bytes for equal numbers."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.report.plots import PALETTE, legend, save, smooth

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SMOOTH_STEPS = 5


def draw(result: Mapping[str, Any], directory: Path) -> None:
    """One picture for each part that was measured and has one."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, drawing in (("curves", _curves), ("loop", _loop)):
        if name in result:
            path = directory / f"learning-{name}.png"
            save(path, partial(drawing, figures=result[name]))
            print(f"drawn: {path}")


def _curves(axes: Axes, figures: Mapping[str, Any]) -> None:
    for (name, seeds), color in zip(figures["trainers"].items(), PALETTE, strict=False):
        rewards = np.array([of_seed["rewards"] for of_seed in seeds])
        steps = np.arange(rewards.shape[1])
        for each in rewards:
            axes.plot(steps, smooth(each, _SMOOTH_STEPS), color=color, alpha=0.2, linewidth=0.8)
        mean = smooth(rewards.mean(axis=0), _SMOOTH_STEPS)
        axes.plot(steps, mean, color=color, linewidth=1.8, label=name)
    axes.set(
        title="Reward of what is sampled, by training step",
        xlabel=f"policy update (averaged over {_SMOOTH_STEPS} steps; faint: each seed)",
        ylabel="mean reward",
    )
    legend(axes)


def _loop(axes: Axes, figures: Mapping[str, Any]) -> None:
    labels = {"fixed": "reward model stays", "renewed": "reward model is trained further"}
    for (name, label), color in zip(labels.items(), PALETTE, strict=False):
        grades = np.array([[row["grade"]["mean"] for row in rounds] for rounds in figures[name]])
        rounds = np.arange(grades.shape[1]) + 1
        for each in grades:
            axes.plot(rounds, each, color=color, alpha=0.3, linewidth=0.8)
        mean = grades.mean(axis=0)
        axes.plot(rounds, mean, color=color, marker="o", linewidth=1.8, label=label)
    axes.set(
        title="What the policy says, by the judge's rule (0 to 3)",
        xlabel="round (faint: each seed)",
        ylabel="mean grade on fresh prompts",
        xticks=[row["round"] for row in figures["fixed"][0]],
    )
    legend(axes)
