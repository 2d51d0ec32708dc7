"""Every setting of a training as an option of a command. No heavier than `trainer.config.train`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING

from reward_actor.command_line import add_setting, option
from trainer.config.config_file import load_config, preset_names
from trainer.config.data import Section
from trainer.config.train import TrainConfig

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo


def leaves() -> Iterator[tuple[str, FieldInfo]]:
    """Every setting as (dotted key, field), in the order of the file."""
    for name, field in TrainConfig.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, Section):
            yield from ((f"{name}.{key}", leaf) for key, leaf in section.model_fields.items())
        else:
            yield name, field


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --config and one option for every setting, under the heading of its section."""
    parser.add_argument(
        "--config",
        metavar="FILE|PRESET",
        help="YAML file with the settings below, or one of "
        f"{', '.join(preset_names())} [what suits the network that is trained]",
    )
    groups: dict[str, argparse._ActionsContainer] = {"": parser}
    for key, field in leaves():
        section = key.rpartition(".")[0]
        if section not in groups:
            groups[section] = parser.add_argument_group(section)
        add_setting(groups[section], key, field, dest=key)


def config_from_arguments(args: argparse.Namespace) -> TrainConfig:
    """The config of a parser that `add_arguments` has filled. Raises ValueError, which names a
    setting as it was given: as an option, or as a key of the file."""
    overrides = [(key, getattr(args, key)) for key, _ in leaves() if key in args]
    return load_config(args.config, overrides, typed_keys(args))


def typed_keys(args: argparse.Namespace) -> dict[str, str]:
    """The options of those settings that a file does not give: all of them where there is none."""
    return {key: option(key) for key, _ in leaves() if args.config is None or key in args}
