"""Which preset suits what is trained, for a training whose settings are not given."""

from __future__ import annotations

from typing import NamedTuple

_TINY = 50e6  # parameters; a network so small is trained like one from scratch
_SMALL = 2e9


class Chosen(NamedTuple):
    preset: str
    """As `--config` takes it."""
    why: str


def preset_for(model: str | None, *, has_adapter: bool) -> Chosen:
    """The preset for a base model (None: one from scratch), by its size and whether adapters are
    trained. Raises ValueError for a model that cannot be loaded."""
    if model is None:
        return Chosen("quickstart", "a network from scratch")
    if has_adapter:
        return Chosen("llama-8b-lora", "adapters")
    size = _num_parameters(model)
    shown = f"{size / 1e6:,.0f} million parameters" if size < 1e9 else f"{size / 1e9:.1f} billion"
    if size < _TINY:
        return Chosen("quickstart", f"a network of {shown}")
    return Chosen("qwen3-0.6b" if size < _SMALL else "llama-8b", f"a pretrained network of {shown}")


def _num_parameters(model: str) -> int:
    import torch
    from transformers import AutoModelForSequenceClassification

    from trainer.network.base_config import base_config

    config = base_config(model)
    try:
        with torch.device("meta"):  # shapes only
            network = AutoModelForSequenceClassification.from_config(config)
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"model.path: {model} cannot be trained: {reason}") from error
    return sum(parameter.numel() for parameter in network.parameters())
