"""The plots of a training, as PNG files of equal bytes for equal numbers.

Shapes: P held-out pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.evaluation.metrics import EvalResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

# Okabe and Ito's palette, which colour-blind people can tell apart (jfly.uni-koeln.de/color).
_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "#6E6E6E"
PALETTE = (_BLUE, _ORANGE, "#009E73", "#CC79A7", "#56B4E9")
_CHOSEN: dict[str, Any] = {"color": _BLUE, "label": "chosen"}
_REJECTED: dict[str, Any] = {"color": _ORANGE, "label": "rejected"}
_MAX_DOTS = 4000
_STYLE: Any = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same on every machine
    "font.size": 10,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.titlepad": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "figure.constrained_layout.h_pad": 0.12,  # inches
    "figure.constrained_layout.w_pad": 0.12,
    "figure.figsize": (7.0, 4.2),
    "figure.dpi": 130,
}


@dataclass(frozen=True)
class HeldOut:
    """Rewards and tokens of the held-out pairs' sides, each (P,), and what they add up to."""

    chosen: Floats
    rejected: Floats
    chosen_tokens: NDArray[np.int64]
    rejected_tokens: NDArray[np.int64]
    result: EvalResult


Lines = Sequence[Mapping[str, Any]]
"""Lines of training_log.jsonl or of evaluations.jsonl."""


def write_plots(
    directory: Path, log: Lines, evaluations: Lines, heldout: HeldOut | None
) -> dict[str, str]:
    """Write the plots there is something for as `directory/NAME.png`; what each shows, by NAME."""
    drawings: dict[str, tuple[str, Callable[[Axes], None]]] = {}
    for key, name, draw in (
        ("loss", "loss", _loss),
        ("accuracy", "accuracy", _accuracy),
        ("raw_margin", "margin", _margin),
    ):  # a training on attributes alone has neither accuracy nor margin
        if np.isfinite(_column(log, key)).any() and (key == "loss" or _has_pairs(log)):
            title = f"{key.replace('_', ' ').capitalize()} by step"
            drawings[name] = (title, partial(draw, log=log, evaluations=evaluations))
    if heldout is not None:
        drawings |= {
            "calibration": (
                "How often the predicted preference is right, by its confidence",
                partial(_calibration, result=heldout.result),
            ),
            "rewards": ("Distribution of the held-out rewards", partial(_rewards, heldout=heldout)),
            "length": ("Held-out reward by length", partial(_length, heldout=heldout)),
        }
    directory.mkdir(parents=True, exist_ok=True)
    for name, (_, drawing) in drawings.items():
        save(directory / f"{name}.png", drawing)
    return {name: shown for name, (shown, _) in drawings.items()}


def _has_pairs(log: Lines) -> bool:
    return any(line.get("num_pairs", 1) for line in log)


def save(path: Path, draw: Callable[[Axes], None]) -> None:
    """A PNG file of what `draw` makes of its axes."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # the user's own style would change the bytes
        matplotlib.rcParams.update(_STYLE)
        figure = Figure(layout="constrained")
        canvas = FigureCanvasAgg(figure)
        draw(figure.add_subplot())
        # Not savefig, which lays everything out once more before it draws.
        canvas.print_png(path, metadata={"Software": None})


def smooth(values: Floats, steps: float) -> Floats:
    """(n,) values -> their exponential moving average over about `steps`, without a bias at the
    start (Kingma and Ba, arXiv:1412.6980, section 3)."""
    keep = 1 - 1 / max(steps, 1.0)
    total, weight, averages = 0.0, 0.0, np.empty(len(values))
    for index, value in enumerate(values):
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        averages[index] = total / weight
    return averages


def _column(lines: Lines, key: str) -> Floats:
    values = [np.nan if line.get(key) is None else float(line[key]) for line in lines]
    return np.array(values, dtype=np.float64)


def _curve(axes: Axes, log: Lines, key: str) -> None:
    """The training's own numbers: every step faintly, their average strongly."""
    steps, values = _column(log, "step"), _column(log, key)
    known = np.isfinite(values)
    steps, values = steps[known], values[known]
    width, label = len(values) // 25, "training"
    if width >= 2:
        axes.plot(steps, values, color=_BLUE, alpha=0.25, linewidth=0.8)
        values, label = smooth(values, width), f"training, averaged over {width} steps"
    marker = "o" if len(values) < 3 else None
    axes.plot(steps, values, color=_BLUE, linewidth=1.8, marker=marker, label=label)
    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_locator(_whole_numbers())


def _heldout_curve(axes: Axes, evaluations: Lines, key: str, label: str) -> None:
    steps, values = _column(evaluations, "step"), _column(evaluations, key)
    if np.isfinite(values).any():
        axes.plot(steps, values, color=_ORANGE, marker="o", markersize=5, linewidth=1.4,
                  label=label)  # fmt: skip


def _loss(axes: Axes, log: Lines, evaluations: Lines) -> None:
    _curve(axes, log, "loss")
    _heldout_curve(axes, evaluations, "log_loss", "held out (log loss)")
    axes.set(title="Loss", ylabel="mean loss (nats)")
    axes.axhline(np.log(2), color=_GREY, linewidth=1, linestyle=":", label="guessing (ln 2)")
    legend(axes)


def _accuracy(axes: Axes, log: Lines, evaluations: Lines) -> None:
    _curve(axes, log, "accuracy")
    _heldout_curve(axes, evaluations, "accuracy", "held out, 95 % interval")
    steps, middle = _column(evaluations, "step"), _column(evaluations, "accuracy")
    low, high = _column(evaluations, "accuracy_low"), _column(evaluations, "accuracy_high")
    axes.errorbar(
        steps, middle, yerr=np.abs(np.stack([middle - low, high - middle])), fmt="none",
        ecolor=_ORANGE, capsize=3, linewidth=1.2,
    )  # fmt: skip
    axes.axhline(0.5, color=_GREY, linewidth=1, linestyle=":", label="guessing")
    axes.set(title="Accuracy", ylabel="share of pairs with chosen ahead")
    axes.yaxis.set_major_formatter(_percent())
    legend(axes)


def _margin(axes: Axes, log: Lines, evaluations: Lines) -> None:
    _curve(axes, log, "raw_margin")
    _heldout_curve(axes, evaluations, "raw_margin", "held out")
    axes.axhline(0, color=_GREY, linewidth=1, linestyle=":")
    axes.set(
        title="Margin of the raw scores (before normalisation)", ylabel="mean of chosen - rejected"
    )
    legend(axes)


def _calibration(axes: Axes, result: EvalResult) -> None:
    bins = [bin for bin in result.calibration_bins if bin.num_pairs]
    axes.plot([0.5, 1], [0.5, 1], color=_GREY, linestyle=":", linewidth=1, label="calibrated")
    width = bins[0].high - bins[0].low
    axes.bar(
        [bin.low for bin in bins], [bin.accuracy or 0.0 for bin in bins], width=width * 0.92,
        align="edge", color=_BLUE, alpha=0.3, label="right in this bin",
    )  # fmt: skip
    axes.plot(
        [bin.confidence or 0.0 for bin in bins], [bin.accuracy or 0.0 for bin in bins],
        color=_BLUE, marker="o", linewidth=1.4, label="at their mean confidence",
    )  # fmt: skip
    for bin in bins:
        axes.annotate(
            f"{bin.num_pairs:,}", (bin.low + width / 2, 0.0), xytext=(0, 4),
            textcoords="offset points", ha="center", fontsize=8, color="#333333",
        )  # fmt: skip
    axes.set(
        title=f"Calibration (expected error {100 * result.calibration_error:.1f} %)",
        xlabel="confidence: sigmoid of the absolute raw margin (numbers: pairs)",
        ylabel="share of pairs predicted right",
        xlim=(0.495, 1.005),
        ylim=(0, 1.02),
    )
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(_percent())
    legend(axes)


def _rewards(axes: Axes, heldout: HeldOut) -> None:
    both = np.concatenate([heldout.chosen, heldout.rejected])
    low, high = float(both.min()), float(both.max())
    if high <= low:
        low, high = low - 0.5, high + 0.5
    num_bins = int(np.clip(2 * np.sqrt(len(heldout.chosen)), 8, 60))
    edges = np.linspace(low, high, num_bins + 1).tolist()
    for values, side in ((heldout.chosen, _CHOSEN), (heldout.rejected, _REJECTED)):
        color = side["color"]
        axes.hist(values, edges, alpha=0.3, **side)
        axes.hist(values, edges, histtype="step", color=color, linewidth=1.4)
        axes.axvline(float(values.mean()), color=color, linewidth=1.2, linestyle="--")
    axes.set(title="Rewards of the held-out pairs (dashed: means)", xlabel="reward", ylabel="pairs")
    axes.yaxis.set_major_locator(_whole_numbers())
    legend(axes)


def _length(axes: Axes, heldout: HeldOut) -> None:
    # Too many dots hide one another; which ones are drawn is always the same.
    drawn = np.random.default_rng(0).permutation(len(heldout.chosen))[: _MAX_DOTS // 2]
    size = 18 if len(drawn) < 500 else 8
    for rewards, tokens, side in (
        (heldout.chosen, heldout.chosen_tokens, _CHOSEN),
        (heldout.rejected, heldout.rejected_tokens, _REJECTED),
    ):
        axes.scatter(tokens[drawn], rewards[drawn], s=size, alpha=0.45, linewidths=0, **side)
    correlation = heldout.result.length_correlation
    known = "not defined" if correlation is None else f"{correlation:+.2f}"
    axes.set(
        title=f"Length bias (correlation of reward and length: {known})",
        xlabel="tokens of prompt and completion",
        ylabel="reward",
    )
    axes.xaxis.set_major_locator(_whole_numbers())
    legend(axes)


def legend(axes: Axes) -> None:
    """Below the axes, where no data is."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.legend(loc="outside lower left", ncols=3, frameon=False)


def _whole_numbers() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(integer=True, min_n_ticks=1)  # a log of one step has one


def _percent() -> Any:
    from matplotlib.ticker import PercentFormatter

    return PercentFormatter(xmax=1, decimals=0)
