"""Cross-validation by prompt: as many trainings as folds, each measured on prompts of its own."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from reward_actor.json_files import replace_text
from trainer import console
from trainer.config.train import TrainConfig
from trainer.report.describe import run_name
from trainer.run import train

FOLDS_FILE = "folds.json"


@dataclass(frozen=True)
class Ahead:
    """By how much the model's accuracy is above a baseline's, on the same pairs."""

    accuracy: float
    ahead: float
    ahead_error: float


@dataclass(frozen=True)
class FoldsResult:
    """`accuracy` is that of all pairs, each judged by the model that has not seen its prompt.

    Errors are standard errors of other prompts: folds have none in common, so that theirs add up as
    those of independent samples do.
    """

    accuracy: float
    accuracy_error: float
    num_prompts: int
    num_pairs: int
    baselines: dict[str, Ahead]
    folds: list[dict[str, Any]]
    """What each fold's training gave: `TrainResult.metrics`."""


def train_folds(
    config: TrainConfig, num_folds: int, say: Callable[[str], None] = console.say
) -> FoldsResult:
    """Train on all but one of `num_folds` parts of the prompts, for each part, and measure on it.

    Fold k is a run of its own in `output_dir`/fold-k, which goes on where it was interrupted; what
    they say together is in `output_dir`/folds.json. Raises what `train` raises, and ValueError for
    a config that says itself what is held out or where its one model goes.
    """
    for name, given in (
        ("data.eval", config.data.eval),
        ("data.fold", config.data.fold),
        ("report.push_to_hub", config.report.push_to_hub),
    ):
        if given:
            raise ValueError(
                f"{name}: --folds trains {num_folds} models, each on a part of data.train; leave "
                "it away"
            )
    if num_folds < 2:
        raise ValueError(f"--folds {num_folds}: there must be two at least")
    results = []
    for number in range(1, num_folds + 1):
        say(f"fold {number} of {num_folds}")
        results.append(train(_fold(config, number, num_folds), say).metrics)
        if "heldout_accuracy" not in results[-1]:
            raise ValueError(f"fold {number} holds no pair, so that nothing can be measured by it")
    found = _together(results)
    file = Path(config.output_dir).expanduser() / FOLDS_FILE
    replace_text(file, json.dumps(asdict(found), indent=2) + "\n")
    for line in _report(found):
        say(line)
    return found


def _fold(config: TrainConfig, number: int, num_folds: int) -> TrainConfig:
    name = f"fold-{number}"
    fold = config.model_copy(deep=True)
    fold.data.fold = f"{number}/{num_folds}"
    fold.output_dir = str(Path(config.output_dir) / name)
    if fold.checkpoint.storage_path is not None:
        fold.checkpoint.storage_path = f"{fold.checkpoint.storage_path.rstrip('/')}/{name}"
    fold.report.run_name = f"{run_name(config)}-{name}"
    return fold


def _together(folds: Sequence[Mapping[str, Any]]) -> FoldsResult:
    num_pairs: list[int] = [fold["heldout_num_pairs"] for fold in folds]

    def mean(values: Sequence[float]) -> float:
        return sum(n * v for n, v in zip(num_pairs, values, strict=True)) / sum(num_pairs)

    def error(values: Sequence[float]) -> float:
        return math.hypot(*(n * v for n, v in zip(num_pairs, values, strict=True))) / sum(num_pairs)

    baselines = {}
    for name in folds[0].get("heldout_baselines", {}):
        of = [fold["heldout_baselines"][name] for fold in folds]
        baselines[name] = Ahead(
            mean([one["accuracy"] for one in of]),
            mean([one["ahead"] for one in of]),
            error([one["ahead_error"] for one in of]),
        )
    return FoldsResult(
        mean([fold["heldout_accuracy"] for fold in folds]),
        error([fold["heldout_accuracy_error"] for fold in folds]),
        sum(fold["heldout_num_prompts"] for fold in folds),
        sum(num_pairs),
        baselines,
        [dict(fold) for fold in folds],
    )


def _report(found: FoldsResult) -> list[str]:
    lines = [
        f"fold {number}: accuracy {fold['heldout_accuracy']:.4f} on {fold['heldout_num_pairs']:,} "
        f"pairs of {fold['heldout_num_prompts']:,} prompts"
        for number, fold in enumerate(found.folds, 1)
    ]
    lines.append(
        f"all folds: accuracy {found.accuracy:.4f} +- {found.accuracy_error:.4f} (standard error "
        f"over {found.num_prompts:,} prompts; {found.num_pairs:,} pairs)"
    )
    return lines + [
        f"  {of.ahead:+.4f} +- {of.ahead_error:.4f} above {name} ({of.accuracy:.4f})"
        for name, of in found.baselines.items()
    ]
