"""Every setting of a training as an option of a command. No heavier than `trainer.config.train`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from reward_actor.config_errors import did_you_mean
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
    """Add --config and one option for every setting, with its default and description."""
    parser.add_argument(
        "--config",
        metavar="FILE|PRESET",
        help="YAML file with the settings below, or one of "
        f"{', '.join(preset_names())} [what suits the network that is trained]",
    )
    for key, field in leaves():
        default = "required" if field.is_required() else _shown(field.default)
        parser.add_argument(
            "--output-dir" if key == "output_dir" else f"--{key}",
            dest=key,
            metavar=_metavar(field),
            default=argparse.SUPPRESS,
            help=f"{field.description} [{default}]".replace("%", "%%"),
        )


def config_from_arguments(args: argparse.Namespace, unknown: Sequence[str] = ()) -> TrainConfig:
    """The config of a parser that `add_arguments` has filled.

    `unknown` is what `parse_known_args` left over; it raises ValueError, with the nearest option.
    """
    for argument in unknown:
        if argument.startswith("-"):
            name = argument.lstrip("-").partition("=")[0]
            known = [key for key, _ in leaves()]
            raise ValueError(f"unknown option --{name}" + did_you_mean(name, known))
    if unknown:
        raise ValueError(f"unexpected argument {unknown[0]!r}")
    given = vars(args)
    return load_config(args.config, [(key, given[key]) for key, _ in leaves() if key in given])


def _shown(value: Any) -> str:
    return (
        "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    )


def _metavar(field: FieldInfo) -> str:
    annotation = field.annotation
    if getattr(annotation, "__origin__", None) is dict:
        return "YAML"
    if getattr(annotation, "__origin__", None) is Literal:
        return "|".join(annotation.__args__)  # type: ignore[union-attr]
    for kind, shown in ((bool, "BOOL"), (int, "INT"), (float, "FLOAT")):
        if kind is annotation or kind in getattr(annotation, "__args__", ()):
            return shown
    return "TEXT"
