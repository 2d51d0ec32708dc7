"""What a training says at its end: how good the model is, where it is, what to type next."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from reward_actor.sources import is_file_name
from reward_actor.terminal import out
from trainer.config.data import DataConfig
from trainer.evaluation.metrics import RMSE
from trainer.report import describe


def show_summary(export_dir: Path, metrics: Mapping[str, Any], data: DataConfig) -> None:
    """Print `summary`."""
    console = Console(file=out(), highlight=False)
    with contextlib.suppress(OSError):
        for line in summary(export_dir, metrics, data):
            console.print(line, soft_wrap=True)


def summary(export_dir: Path, metrics: Mapping[str, Any], data: DataConfig) -> list[Text]:
    """Lines for people; `metrics` are the `heldout_*` numbers of `TrainResult`, `data` is as it was
    typed."""
    found = {key.removeprefix("heldout_"): value for key, value in metrics.items()}
    report = export_dir / "report.html"
    lines = [Text(), *_accuracy(found), *_errors(found), Text()]
    lines.append(Text(f"the reward model is in {export_dir}"))
    if report.exists():
        lines.append(Text(f"the report is {report}"))
    lines.append(Text("next:"))
    return lines + [Text(f"  {command}", "cyan") for command in _commands(export_dir, data)]


def _accuracy(found: Mapping[str, Any]) -> list[Text]:
    """The accuracy and what it has to be compared with."""
    if "accuracy" not in found:
        return [Text("no pairs were held out: nothing is known about the accuracy", "yellow")]
    if "num_prompts" not in found:  # of a run of an older version, whose interval was too narrow
        return []
    low, high = found["accuracy_low"], found["accuracy_high"]
    lines = [
        Text.assemble(
            "held-out accuracy ",
            (f"{100 * found['accuracy']:.1f} %", "bold"),
            f" (95 % interval {100 * low:.1f} to {100 * high:.1f} %) on {found['num_pairs']:,} "
            f"pairs of {found['num_prompts']:,} prompts",
        )
    ]
    chance = describe.chance(low, high)
    if chance:
        lines.append(Text(f"  {chance}", "bold red"))
    for name, one in found.get("baselines", {}).items():
        mean, low, high = (100 * one["lead"][key] for key in ("mean", "low", "high"))
        verdict = describe.verdict(one["lead"])
        lines.append(
            Text(
                f"  {name} alone reaches {100 * one['accuracy']:.1f} %; the model is ahead by "
                f"{mean:+.1f} points ({low:+.1f} to {high:+.1f}): {verdict}",
                "" if verdict == "better" else "red",
            )
        )
    return lines


def _errors(found: Mapping[str, Any]) -> list[Text]:
    return [
        Text(f"  error of {key.removeprefix(RMSE)} {value:.3f} (root mean square, held out)")
        for key, value in found.items()
        if key.startswith(RMSE)
    ]


def _commands(export_dir: Path, data: DataConfig) -> list[str]:
    """As they are typed; in capitals the files that only the user knows."""
    directory = shlex.quote(str(export_dir))
    # A file with columns of other names would need an option for each.
    known = [name for name, of in data.sources("eval").items() if not of.named]
    pairs = next((shlex.quote(name) for name in known if is_file_name(name)), "PAIRS.jsonl")
    return [
        f"rayward eval {directory} {pairs}",
        f"rayward score {directory} COMPLETIONS.jsonl REWARDS.jsonl",
        f"rayward serve {directory}",
    ]
