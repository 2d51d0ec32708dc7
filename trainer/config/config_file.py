"""A training's settings from a YAML file and dotted overrides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from reward_actor.config_errors import validate
from trainer.config.train import TrainConfig

_PRESETS = Path(__file__).with_name("presets")


def preset_names() -> list[str]:
    return sorted(file.stem for file in _PRESETS.glob("*.yaml"))


def load_config(
    path: str | None,
    overrides: Sequence[tuple[str, str | bool]] = (),
    options: Mapping[str, str] | None = None,
) -> TrainConfig:
    """The YAML file at `path`, or the preset of that name, with dotted keys replaced, in order, by
    `overrides`.

    Lists and mappings are given as YAML: `["a", "b"]`, `{name: 0.5}`. `options`: how keys are
    typed, for complaints. Raises ValueError for a file that cannot be read, and for every key that
    is unknown (naming the nearest one), missing or wrong.
    """
    data = {} if path is None else _read_yaml(_file(path))
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
        place[leaf] = _value((options or {}).get(key, key), value)
    return validate(TrainConfig, data, path or "", options)


def _file(path: str) -> Path:
    preset = _PRESETS / f"{path}.yaml"
    return preset if path in preset_names() and not Path(path).is_file() else Path(path)


def _value(key: str, text: str | bool) -> Any:
    if isinstance(text, bool):
        return text
    if text.lower() in ("none", "null"):
        return None
    if not text.startswith(("[", "{")):
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{key} is {text!r}, which is not YAML: {_in_one_line(error)}") from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"--config: cannot read {path}: {error.strerror}. Presets are "
            + ", ".join(preset_names())
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config: {path} is not YAML: {_in_one_line(error)}") from error
    if not isinstance(data or {}, dict):
        raise ValueError(f"--config: {path} holds {type(data).__name__}, not sections of settings")
    return data or {}


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())
