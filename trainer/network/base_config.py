"""The configuration of the network that is trained. Light: the network itself is not imported."""

from __future__ import annotations

from typing import cast

from transformers import AutoConfig, PretrainedConfig


def base_config(path: str, num_outputs: int = 1) -> PretrainedConfig:
    """The network's configuration: `num_outputs` labels, no noise. Raises ValueError for no such
    model."""
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"model.path: {path} cannot be loaded: {reason}") from error
    config.num_labels = num_outputs
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        for name, value in vars(part).items():
            # Noise would make the loss another function than the reward that is served.
            if ("drop" in name or "jitter" in name) and isinstance(value, float):
                setattr(part, name, 0.0)
    return cast("PretrainedConfig", config)
