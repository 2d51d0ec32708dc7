"""What the card and the report say about a training in the same words, without any path in it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Literal
from urllib.parse import urlsplit

from trainer.config.data import DataConfig
from trainer.config.train import LossConfig, TrainConfig
from trainer.evaluation.intervals import Estimate


def public(config: TrainConfig) -> TrainConfig:
    """The settings for other people's eyes: of every path only its last part."""
    return TrainConfig.model_validate(_shortened(config.model_dump()))


def last_part(name: str) -> str:
    """Of an absolute path or an address its last part; any other name, such as the hub's, whole."""
    if "://" in name:  # its query may say where a company keeps its data
        name = "/" + urlsplit(name).path.strip("/")
    return PurePosixPath(name).name if name.startswith(("/", "~")) else name


def _shortened(value: Any) -> Any:
    if isinstance(value, str):
        return last_part(value)
    if isinstance(value, list):
        return [_shortened(item) for item in value]
    if not isinstance(value, dict):
        return value
    named: dict[str, Any] = {}
    for key, inner in value.items():
        name = last_part(key)
        # Two files in different folders may have one name.
        named[f"{name} ({len(named) + 1})" if name in named else name] = _shortened(inner)
    return named


def run_name(config: TrainConfig) -> str:
    return config.report.run_name or Path(config.output_dir).name


def base_name(config: TrainConfig) -> str:
    """Of the network that the training started from."""
    return "from scratch" if config.is_from_scratch else last_part(config.model.directory)


def source_names(data: DataConfig, which: Literal["train", "eval"]) -> str:
    sources = data.sources(which)
    weights = _shortened({name: source.weight for name, source in sources.items()})
    return ", ".join(
        name if weight == 1 else f"{name} (weight {weight:g})" for name, weight in weights.items()
    )


def evaluation_set(data: DataConfig) -> str:
    if data.eval is not None:
        return source_names(data, "eval")
    if data.fold is not None:
        return f"part {data.fold} of the prompts, which was not trained on"
    share = data.eval_fraction
    return f"{100 * share:.1f} % of the prompts, which were not trained on" if share else "none"


def heldout_notes(config: TrainConfig, num_shared: int | None, what: str) -> list[str]:
    """What has to be known to read the numbers of held-out `what` (pairs, or completions);
    `num_shared` prompts of data.eval are in data.train, too."""
    notes = []
    if config.data.eval is None or num_shared == 0:
        notes.append(f"The held-out {what} are about prompts that were not trained on.")
    elif num_shared:
        notes.append(
            f"{num_shared:,} of their prompts were trained on as well: the numbers are too good."
        )
    if config.evaluation.keep_best or config.evaluation.patience:
        notes.append(f"The checkpoint was chosen on these {what}: the numbers are a bit too good.")
    return notes


def chance(low: float, high: float) -> str:
    """What the 95 % interval of an accuracy says about guessing; nothing where it is above that."""
    if low > 0.5:
        return ""
    if high < 0.5:
        return "below chance: the rejected side more often gets the higher reward"
    return "not above chance: the interval includes 50 %"


def verdict(lead: Mapping[str, Any]) -> str:
    """Whether the model is better than a baseline, given its lead (an `Estimate`) over it."""
    return {1: "better", -1: "worse", 0: "not shown to be better"}[Estimate(**lead).sign]


def losses(loss: LossConfig, counts: Mapping[str, int]) -> dict[str, str]:
    """What it was trained by, in words, and the Hub's tag for each; `counts` are those of the
    training comparisons (`Comparisons.counts`)."""
    found = {}
    if counts["ties"]:  # then the model of ties is that of the decided pairs, too
        ties = "Rao-Kupper" if loss.ties == "rao_kupper" else "Davidson"
        found[f"{ties} on pairs and ties"] = ties.lower()
    elif counts["pairs"]:
        found["Bradley-Terry on pairs"] = "bradley-terry"
    if counts["rankings"]:
        found["Plackett-Luce on rankings"] = "plackett-luce"
    if loss.attributes:
        found["regression of attributes"] = "attribute-regression"
    return found


def loss_settings(loss: LossConfig, counts: Mapping[str, int]) -> str:
    """The loss with what changes it."""
    parts = list(losses(loss, counts))
    if counts["ties"]:
        parts.append(f"tie parameter {loss.tie_parameter:g}")
    if counts["margins"] and loss.use_margin:
        parts.append("margins subtracted")
    if loss.label_smoothing:
        parts.append(f"label smoothing {loss.label_smoothing:g}")
    if loss.center_rewards_coefficient:
        parts.append(f"centring {loss.center_rewards_coefficient:g}")
    if loss.attributes:
        parts.append(f"attributes times {loss.attribute_coefficient:g}")
    return "; ".join(parts)


def adapter(config: TrainConfig) -> str:
    """What of the network was trained."""
    if config.adapter.rank:
        bits = f", on weights in {config.adapter.quantize}" if config.adapter.quantize else ""
        return f"LoRA of rank {config.adapter.rank}, alpha {config.adapter.alpha:g}{bits}"
    frozen = ", ".join(config.model.freeze)
    return f"none; all weights but {frozen}" if frozen else "none; all weights"


def trained_on(counts: Mapping[str, int]) -> str:
    kinds = {name: number for name, number in counts.items() if number and name != "margins"}
    return ", ".join(f"{number:,} {name}" for name, number in kinds.items())


def weighted_sum(attributes: Mapping[str, float]) -> str:
    """The reward, of attributes: `0.6 helpfulness + 0.4 safety`."""
    return " + ".join(f"{weight:g} {name}" for name, weight in attributes.items())
