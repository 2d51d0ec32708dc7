"""Cross-validation by prompt: as many trainings as folds, each measured on its own prompts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from reward_actor import terminal
from reward_actor.atomic import replace_text
from trainer.config.train import TrainConfig
from trainer.data.split import MIN_PROMPTS
from trainer.evaluation.intervals import NORMAL
from trainer.report import describe
from trainer.run import train

FOLDS_FILE = "folds.json"


@dataclass(frozen=True)
class Lead:
    """By how much the model's accuracy is above a baseline's, on the same pairs."""

    accuracy: float
    lead: float
    lead_stderr: float


@dataclass(frozen=True)
class FoldsResult:
    """`accuracy` is that of all pairs, each judged by the model that has not seen its prompt.

    Standard errors are of other held-out prompts, for these models: folds share no prompt, so that
    they add up as those of independent samples. How far other training prompts or seeds would take
    the accuracy they do not say, nor can K-fold cross-validation (Bengio and Grandvalet, JMLR 5,
    2004); the accuracies of the single folds give an idea.
    """

    accuracy: float
    accuracy_stderr: float
    num_prompts: int
    num_pairs: int
    baselines: dict[str, Lead]
    folds: list[dict[str, Any]]
    """What each fold's training gave: `TrainResult.metrics`."""


def train_folds(
    config: TrainConfig, num_folds: int, say: Callable[[str], None] = terminal.say
) -> FoldsResult:
    """Train on all but one of `num_folds` parts of the prompts, for each part, and measure on it.

    Fold k is a run in `output_dir`/fold-k, which resumes where it was interrupted; what they say
    together is in `output_dir`/folds.json. Raises what `train` raises, and ValueError for settings
    that make no sense for folds.
    """
    for name, why in (
        ("data.eval", "what is held out is a part of data.train"),
        ("data.fold", "each part is held out once"),
        ("report.push_to_hub", f"there are {num_folds} models"),
        ("evaluation.keep_best", "it would choose a checkpoint by the part that then measures it"),
        ("evaluation.patience", "it would end a training by the part that then measures it"),
    ):
        section, key = name.split(".")
        if getattr(getattr(config, section), key):
            raise ValueError(f"{name} cannot be used with --folds: {why}")
    if num_folds < 2:
        raise ValueError(f"--folds {num_folds}: there must be two at least")
    results = []
    for number in range(1, num_folds + 1):
        say(f"fold {number} of {num_folds}")
        metrics = train(_fold(config, number, num_folds), say).metrics
        say(
            f"fold {number}: accuracy {metrics['heldout_accuracy']:.4f} on "
            f"{metrics['heldout_num_pairs']:,} pairs of {metrics['heldout_num_prompts']:,} prompts"
        )
        results.append(metrics)
    found = _pooled(results)
    file = Path(config.output_dir).expanduser() / FOLDS_FILE
    replace_text(file, json.dumps(asdict(found), indent=2) + "\n")
    for line in [*_report(found), f"all of this is in {file}"]:
        say(line)
    return found


def _fold(config: TrainConfig, number: int, num_folds: int) -> TrainConfig:
    name = f"fold-{number}"
    fold = config.model_copy(deep=True)
    fold.data.fold = f"{number}/{num_folds}"
    fold.output_dir = str(Path(config.output_dir) / name)
    if fold.checkpoint.storage_path is not None:
        fold.checkpoint.storage_path = f"{fold.checkpoint.storage_path.rstrip('/')}/{name}"
    fold.report.run_name = f"{describe.run_name(config)}-{name}"
    return fold


def _pooled(folds: Sequence[Mapping[str, Any]]) -> FoldsResult:
    num_pairs: list[int] = [fold["heldout_num_pairs"] for fold in folds]

    def mean(values: Iterable[float]) -> float:
        return sum(n * v for n, v in zip(num_pairs, values, strict=True)) / sum(num_pairs)

    def stderr(values: Iterable[float]) -> float:
        return math.hypot(*(n * v for n, v in zip(num_pairs, values, strict=True))) / sum(num_pairs)

    of = [fold.get("heldout_baselines", {}) for fold in folds]
    return FoldsResult(
        mean(fold["heldout_accuracy"] for fold in folds),
        stderr(fold["heldout_accuracy_stderr"] for fold in folds),
        sum(fold["heldout_num_prompts"] for fold in folds),
        sum(num_pairs),
        {
            name: Lead(
                mean(one[name]["accuracy"] for one in of),
                mean(one[name]["lead"]["mean"] for one in of),
                stderr(one[name]["lead"]["stderr"] for one in of),
            )
            for name in of[0]
            if all(name in one for one in of)
        },
        [dict(fold) for fold in folds],
    )


def _report(found: FoldsResult) -> list[str]:
    lines = [
        f"all folds: accuracy {found.accuracy:.4f} +- {found.accuracy_stderr:.4f} (standard error, "
        f"{found.num_pairs:,} pairs of {found.num_prompts:,} prompts)"
    ]
    reach = NORMAL * found.accuracy_stderr
    chance = describe.chance(found.accuracy - reach, found.accuracy + reach)
    if chance:
        lines.append(f"warning: {chance}")
    lines += [
        f"  {of.lead:+.4f} +- {of.lead_stderr:.4f} above {name} ({of.accuracy:.4f})"
        for name, of in found.baselines.items()
    ]
    if found.num_prompts < MIN_PROMPTS:
        lines.append(f"warning: with fewer than {MIN_PROMPTS} prompts this is a rough guess")
    return lines
