"""The README.md of an export: a model card with the Hub's metadata."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from reward_actor.contract import ScoringContract
from trainer.config.train import TrainConfig
from trainer.evaluation.metrics import RMSE
from trainer.report import describe

_PLOTS = {
    "plots/loss.png": "Loss by step",
    "plots/accuracy.png": "Accuracy by step",
    "plots/margin.png": "Reward margin by step",
    "plots/calibration.png": "Calibration",
    "plots/length.png": "Reward by length",
    "plots/rewards.png": "Distribution of the rewards",
}
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def model_card(
    config: TrainConfig,
    contract: ScoringContract,
    facts: Mapping[str, Any],
    files: Sequence[str] = (),
) -> str:
    """A model card; `facts` hold the counts and the `heldout_*` metrics, `files` are those of the
    report beside it, as `write_report` names them.

    It holds no path, and no link to what `trainer.report.hub` does not push.
    """
    found = {
        key.removeprefix("heldout_"): value
        for key, value in facts.items()
        if key.startswith("heldout_")
    }
    counts = facts["counts"]
    sections = [
        _evaluation(config, facts, found),
        _subsets(found.get("subsets") or {}),
        _figures(files, config.report.push_report),
    ]
    body = "\n\n".join(section for section in sections if section)
    return f"""---
{_metadata(config, counts, found)}---

# Reward model

{_introduction(config, counts)}

{body}

| | |
|---|---|
| trained on | {describe.trained_on(counts)}; {facts["num_dropped"]} dropped ({facts["dropped"]}) |
| evaluation set | {_cell(describe.evaluation_set(config))} |
| loss | {_cell(describe.loss_settings(config, counts))} |
| adapter | {_cell(describe.adapter(config))} |
| steps | {facts["num_steps"]} of {config.training.global_batch_pairs} pairs |
| learning rate | {config.optimizer.learning_rate:g}, {config.optimizer.schedule} |
| body | {config.model.dtype}; head and loss in float32 |
| format | {contract.format}, at most {contract.max_length} tokens |
| normalisation | reward = (raw score - {contract.mean:.6g}) / {contract.std:.6g} |

```python
from reward_actor import Group, RewardScorer

scorer = RewardScorer.from_pretrained(".")
print(scorer.score([Group(prompt="Name two fruits.", completions=["Apples and pears.", "No."])]))
```

```
rayward serve .
```

`scoring_contract.json` says how text becomes token ids and which of them is pooled;
`training_log.jsonl` has every step of the training.
"""


def _introduction(config: TrainConfig, counts: Mapping[str, int]) -> str:
    *others, last = describe.losses(config, counts)
    trained = f"{', '.join(others)} and {last}" if others else last
    lines = [
        f"A reward model trained by {trained}: one number for a prompt and a completion,\n"
        "higher is better."
    ]
    if config.loss.attributes:
        lines.append(f"The reward is {_cell(describe.weighted_sum(config))}.")
    if counts["pairs"] or counts["ties"] or counts["rankings"]:
        lines.append(
            "It says which of two completions to one prompt is preferred; rewards of different "
            "prompts\nare not comparable."
        )
    return "\n".join(lines)


def _metadata(config: TrainConfig, counts: Mapping[str, int], found: Mapping[str, Any]) -> str:
    """The YAML that the Hub reads (huggingface.co/docs/hub/model-cards-metadata)."""
    sources = list(config.data.sources("train"))
    metadata: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        "tags": ["reward-model", *describe.losses(config, counts).values(), "rayward"],
    }
    # A file's path is nobody else's business, and no name that the Hub knows.
    datasets = sorted({name.partition(":")[0] for name in sources if _is_hub_name(name)})
    if datasets:
        metadata["datasets"] = datasets
    if config.model.path and _is_hub_name(config.model.path):
        metadata["base_model"] = config.model.path
    if "accuracy" in found:
        task = {"type": "text-classification", "name": "Pairwise preference"}
        dataset = {"type": datasets[0] if datasets else "preferences", "name": "held-out pairs"}
        names = {
            "accuracy": "Accuracy",
            "log_loss": "Log loss",
            "calibration_error": "Expected calibration error",
        }
        metrics = [
            {"type": kind, "name": name, "value": round(float(found[kind]), 6)}
            for kind, name in names.items()
            if found.get(kind) is not None
        ]
        name = config.report.run_name or Path(config.output_dir).name
        metadata["model-index"] = [
            {"name": name, "results": [{"task": task, "dataset": dataset, "metrics": metrics}]}
        ]
    return yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)


def _is_hub_name(name: str) -> bool:
    name = name.partition(":")[0]
    is_file = name.endswith((".jsonl", ".gz", ".parquet")) or Path(name).exists()
    return _HUB_NAME.fullmatch(name) is not None and not is_file


def _evaluation(config: TrainConfig, facts: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    errors = _errors(found)
    if found.get("accuracy") is None:
        unknown = "No pairs were held out, so nothing is known about its accuracy."
        notes = describe.heldout_notes(config, facts, "completions") if errors else []
        return "\n".join([unknown, *errors, *notes])
    sentences = [
        f"On {found['num_pairs']} held-out pairs the chosen side gets the higher reward\n"
        f"in {_percent(found['accuracy'])} (ties count half{_interval(found)});\n"
        f"the mean difference of the rewards is {found['reward_margin']:.3f}.",
    ]
    if found.get("calibration_error") is not None:
        sentences.append(
            f"Its expected calibration error is {_percent(found['calibration_error'])}, its log "
            f"loss {found['log_loss']:.4f} (guessing: 0.6931)."
        )
    correlation = found.get("length_correlation")
    if correlation is not None:
        sentences.append(f"Reward and length correlate by {correlation:+.2f}{_by_length(found)}.")
    notes = describe.heldout_notes(config, facts, "pairs")
    return "\n".join([*sentences, *notes, *errors])


def _errors(found: Mapping[str, Any]) -> list[str]:
    errors = [
        f"{_cell(name.removeprefix(RMSE))} {value:.3f}"
        for name, value in found.items()
        if name.startswith(RMSE)
    ]
    if not errors:
        return []
    return [f"Root mean squared errors on held-out completions: {', '.join(errors)}."]


def _interval(found: Mapping[str, Any]) -> str:
    low, high = found.get("accuracy_low"), found.get("accuracy_high")
    if low is None or high is None:
        return ""
    return f"; 95 % interval {_percent(low)} to {_percent(high)}, pairs taken as independent"


def _by_length(found: Mapping[str, Any]) -> str:
    parts = [
        f"{_percent(found[f'accuracy_{side}'])} where it is the {side} one"
        for side in ("shorter", "longer")
        if found.get(f"accuracy_{side}") is not None
    ]
    return f"; the chosen side is ahead in {' and '.join(parts)}" if parts else ""


def _subsets(subsets: Mapping[str, Mapping[str, Any]]) -> str:
    if not subsets:
        return ""
    rows = [
        f"| {_cell(name)} | {subset['num_pairs']} | {_percent(subset['accuracy'])} "
        f"| {subset['reward_margin']:.3f} |"
        for name, subset in subsets.items()
    ]
    head = ["| subset | pairs | accuracy | reward margin |", "|---|---:|---:|---:|"]
    return "\n".join([*head, *rows])


def _cell(text: str) -> str:
    """Text inside a Markdown table: no markup, no end of the cell or of the line."""
    return re.sub(r"([\\`*_{}\[\]<>|#!])", r"\\\1", " ".join(text.split()))


def _figures(files: Sequence[str], is_report_pushed: bool) -> str:
    lines = [f"![{shown}]({name})" for name, shown in _PLOTS.items() if name in files]
    if "report.html" in files and is_report_pushed:
        lines.append(
            "[report.html](report.html) has all of this in one page, and the "
            "[hardest held-out pairs](report.html#hardest)."
        )
    elif "report.html" in files:  # no link: a copy of this card may be without it
        lines.append(
            "Where it was trained, `report.html` has all of this in one page, and the hardest "
            "held-out pairs."
        )
    return "\n\n".join(lines)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
