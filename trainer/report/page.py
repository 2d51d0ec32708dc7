"""`report.html`: what a training gave, in one file that needs nothing else.

Shapes: S sequences, P pairs.
"""

from __future__ import annotations

import base64
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from reward_actor.contract import ScoringContract
from trainer.config.options import leaves
from trainer.config.train import TrainConfig
from trainer.data.comparisons import Comparisons
from trainer.evaluation.metrics import RMSE, evaluate, pair_indices
from trainer.job import RunFacts
from trainer.report import describe
from trainer.report.hardest import hardest_pairs
from trainer.report.plots import HeldOut, Lines, write_plots
from trainer.report.templates import TEMPLATES
from trainer.report.tracking import as_text, settings_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

REPORT_FILE = "report.html"
PLOTS_DIR = "plots"


def write_report(
    directory: Path,
    *,
    config: TrainConfig,
    contract: ScoringContract,
    facts: RunFacts,
    metrics: Mapping[str, Any],
    log: Lines,
    evaluations: Lines,
    heldout: Comparisons | None,
    raw_scores: NDArray[Any] | None,
    rewards: NDArray[Any] | None,
    decode: Callable[[Sequence[int]], str],
) -> list[str]:
    """Write `directory/report.html` and `directory/plots/*.png`; returns their names in it. No
    path is shown.

    `metrics` are of the held-out comparisons (`measure`), `raw_scores` (S,) and `rewards` (S,) of
    `heldout`'s sequences; `decode` turns token ids to text. Without matplotlib there are no plots.
    """
    held, hard = None, []
    if (
        heldout is not None
        and raw_scores is not None
        and rewards is not None
        and len(pair_indices(heldout)[0])
    ):
        held = _held_out(heldout, raw_scores, rewards)
        hard = hardest_pairs(heldout, rewards, decode)
    can_draw = importlib.util.find_spec("matplotlib") is not None
    plots = write_plots(directory / PLOTS_DIR, log, evaluations, held) if can_draw else {}
    errors = {k.removeprefix(RMSE): value for k, value in metrics.items() if k.startswith(RMSE)}
    what = "pairs" if held else "completions"
    notes = describe.heldout_notes(config, facts.num_shared_prompts, what)
    default = {key: as_text(field.default) for key, field in leaves() if not field.is_required()}
    settings = settings_of(describe.public(config))
    page = TEMPLATES.get_template(REPORT_FILE).render(
        title=f"Reward model: {describe.run_name(config)}",
        subtitle=_subtitle(config, contract),
        result=held.result if held else None,
        errors=errors,
        baselines=metrics.get("baselines", {}),
        describe=describe,
        facts=facts,
        speed=_speed(log),
        notes=notes if held or errors else [],
        can_draw=can_draw,
        plots=[
            (shown, base64.b64encode((directory / PLOTS_DIR / f"{name}.png").read_bytes()).decode())
            for name, shown in plots.items()
        ],
        pairs=hard,
        data=_data(config, contract, facts),
        changed={key: value for key, value in settings.items() if value != default.get(key)},
        unchanged={key: value for key, value in settings.items() if value == default.get(key)},
    )
    (directory / REPORT_FILE).write_text(page, encoding="utf-8")
    return [REPORT_FILE, *(f"{PLOTS_DIR}/{plot}.png" for plot in plots)]


def _held_out(heldout: Comparisons, raw_scores: NDArray[Any], rewards: NDArray[Any]) -> HeldOut:
    chosen, rejected, _ = pair_indices(heldout)
    values, lengths = rewards.astype(np.float64), heldout.lengths
    return HeldOut(
        values[chosen],
        values[rejected],
        lengths[chosen],
        lengths[rejected],
        evaluate(heldout, raw_scores, rewards),
    )


def _subtitle(config: TrainConfig, contract: ScoringContract) -> str:
    trained = f"LoRA of rank {config.adapter.rank}" if config.adapter.rank else "all weights"
    return f"{describe.base_name(config)}, {trained}, {contract.format} format"


def _speed(log: Lines) -> dict[str, float | None] | None:
    """Of the steps of a log; None without any."""
    if not log:
        return None
    saved = [line["padding_saved"] for line in log if line.get("padding_saved") is not None]
    return {
        "tokens_per_s": float(np.median([line["tokens_per_s"] for line in log])),
        "pairs_per_s": float(np.median([line["pairs_per_s"] for line in log])),
        "padding_saved": float(np.mean(saved)) if saved else None,
        "memory_mb": max(line["memory_mb"] for line in log),
    }


def _data(config: TrainConfig, contract: ScoringContract, facts: RunFacts) -> dict[str, str]:
    rows = {
        "trained on": describe.source_names(config.data, "train"),
        "evaluated on": describe.evaluation_set(config.data),
        "comparisons": describe.trained_on(facts.counts),
        "rows are read as": facts.row_format,
        "loss": describe.loss_settings(config.loss, facts.counts),
        "dropped": f"{facts.num_dropped:,} ({facts.dropped})",
        "longest sequence": f"{contract.max_length:,} tokens at most",
    }
    if (contract.mean, contract.std) != (0.0, 1.0):
        rows["normalisation"] = (
            f"reward = (raw score - {contract.mean:.4g}) / {contract.std:.4g}: mean and standard "
            "deviation of the held-out raw scores. Log loss and calibration are of raw scores, "
            "whose differences the probabilities are made of; so are the curves of the training"
        )
    return rows
