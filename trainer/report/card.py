"""The README.md of an export: a model card with the Hub's metadata."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult as HubResult
from huggingface_hub import ModelCardData

from reward_actor.contract import ScoringContract
from trainer.config.train import TrainConfig
from trainer.evaluation.metrics import RMSE
from trainer.job import RunFacts
from trainer.report import describe
from trainer.report.templates import TEMPLATES

_PLOTS = {
    "plots/loss.png": "Loss by step",
    "plots/accuracy.png": "Accuracy by step",
    "plots/margin.png": "Margin of the raw scores by step",
    "plots/calibration.png": "Calibration",
    "plots/length.png": "Reward by length",
    "plots/rewards.png": "Distribution of the rewards",
}
_METRICS = {
    "accuracy": "Accuracy",
    "log_loss": "Log loss",
    "calibration_error": "Expected calibration error",
}
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def model_card(
    config: TrainConfig,
    contract: ScoringContract,
    facts: RunFacts,
    metrics: Mapping[str, Any],
    files: Sequence[str] = (),
) -> str:
    """A model card; `metrics` are of the held-out comparisons (`measure`), `files` are those of the
    report next to it, as `write_report` names them.

    It holds no path, and no link to what `trainer.report.hub` does not push.
    """
    errors = {k.removeprefix(RMSE): value for k, value in metrics.items() if k.startswith(RMSE)}
    what = "pairs" if "accuracy" in metrics else "completions"
    notes = describe.heldout_notes(config, facts.num_shared_prompts, what)
    *others, last = describe.losses(config.loss, facts.counts)
    return TEMPLATES.get_template("card.md").render(
        metadata=_metadata(config, facts.counts, metrics),
        trained_by=f"{', '.join(others)} and {last}" if others else last,
        config=config,
        contract=contract,
        counts=facts.counts,
        describe=describe,
        errors=errors,
        facts=facts,
        files=files,
        found={"subsets": {}, "baselines": {}, **metrics},
        notes=notes if "accuracy" in metrics or errors else [],
        plots=_PLOTS,
    )


def _metadata(config: TrainConfig, counts: Mapping[str, int], found: Mapping[str, Any]) -> str:
    """The YAML that the Hub reads (huggingface.co/docs/hub/model-cards-metadata)."""
    # A file's path is nobody else's business, and no name that the Hub knows.
    names = filter(_is_hub_name, config.data.sources("train"))
    datasets = sorted({name.partition(":")[0] for name in names})
    metrics = [
        HubResult(
            task_type="text-classification",
            task_name="Pairwise preference",
            dataset_type=datasets[0] if datasets else "preferences",
            dataset_name="held-out pairs",
            metric_type=kind,
            metric_name=name,
            metric_value=round(float(found[kind]), 6),
        )
        for kind, name in _METRICS.items()
        if kind in found
    ]
    base = config.model.path
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="text-classification",
        tags=["reward-model", *describe.losses(config.loss, counts).values(), "rayward"],
        datasets=datasets or None,
        base_model=base if base and _is_hub_name(base) else None,
        model_name=describe.run_name(config) if metrics else None,
        eval_results=metrics or None,
    ).to_yaml()


def _is_hub_name(name: str) -> bool:
    name = name.partition(":")[0]
    is_file = name.endswith((".jsonl", ".gz", ".parquet")) or Path(name).exists()
    return _HUB_NAME.fullmatch(name) is not None and not is_file
