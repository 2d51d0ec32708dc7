"""A training's settings from a YAML file and dotted overrides."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from reward_actor.config_errors import validate
from trainer.config.train import TrainConfig


def load_config(path: str | None, overrides: Sequence[tuple[str, str]] = ()) -> TrainConfig:
    """The YAML file at `path` with dotted keys replaced, in order, by `overrides`.

    Lists and mappings are given as YAML: `["a", "b"]`, `{name: 0.5}`. Raises ValueError for a file
    that cannot be read, and for every key that is unknown (naming the nearest one), missing or
    wrong.
    """
    data = {} if path is None else _read_yaml(Path(path))
    for name in TrainConfig.model_fields:
        if name != "output_dir" and data.get(name) is None:
            data[name] = {}
    for key, value in overrides:
        *sections, leaf = key.split(".")
        place = data
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise ValueError(f"{key}: {section} is {place!r}, not a section")
        place[leaf] = _value(key, value)
    return validate(TrainConfig, data, source=path or "")


def _value(key: str, text: str) -> Any:
    if text.lower() in ("none", "null"):
        return None
    if not text.startswith(("[", "{")):
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{key} is {text!r}, which is not YAML: {error}") from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--config: cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config: {path} is not YAML: {error}") from error
    if not isinstance(data or {}, dict):
        raise ValueError(f"--config: {path} holds {type(data).__name__}, not sections of settings")
    return data or {}
