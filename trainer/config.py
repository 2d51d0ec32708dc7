"""Settings of a training. pydantic and yaml only: neither torch nor ray is imported here."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from reward_actor.settings import did_you_mean, validate

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=())


class ModelConfig(Section):
    path: str | None = Field(
        None,
        min_length=1,
        description="directory or Hugging Face name of the network to start from; none: a small "
        "one from scratch, with a tokenizer trained on the data",
    )

    @property
    def directory(self) -> str:
        """`path` once it is resolved: a training always has a base model."""
        assert self.path is not None
        return self.path

    dtype: Literal["bfloat16", "float32"] = Field(
        "bfloat16", description="of the body; the head, the loss and the optimizer use float32"
    )
    format: Literal["auto", "chat", "text"] = Field(
        "auto", description="chat: the chat template frames a pair; text: prompt + completion"
    )
    max_length: int | None = Field(
        None, ge=64, description="tokens in a sequence; none: what the model allows, at most 2048"
    )


class DataConfig(Section):
    train: str = Field(
        min_length=1, description=".jsonl, .jsonl.gz or .parquet file, or Hugging Face NAME[:SPLIT]"
    )
    eval: str | None = Field(
        None, description="the same, for evaluation; none: a part of train is held out"
    )
    eval_fraction: float = Field(
        0.05, ge=0, lt=1, description="fraction of the prompts held out when there is no eval"
    )
    split_seed: int = Field(0, description="decides which prompts are held out")
    max_pairs: int | None = Field(None, gt=0, description="read only so many rows of train")
    prompt_column: str = Field("prompt", description="may be absent: then a side is a dialogue")
    chosen_column: str = Field("chosen", description="the preferred side: text or messages")
    rejected_column: str = Field("rejected", description="the other side: text or messages")
    margin_column: str = Field("margin", description="how much better chosen is; may be absent")


class OptimizerConfig(Section):
    """AdamW (Loshchilov and Hutter, 2019)."""

    learning_rate: float = Field(9e-6, gt=0, description="at its peak, after the warm-up")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay of all parameters")
    beta1: float = Field(0.9, ge=0, lt=1, description="decay of the gradient's running mean")
    beta2: float = Field(0.95, ge=0, lt=1, description="decay of its running square")
    epsilon: float = Field(1e-8, gt=0, description="added to the denominator")
    warmup_fraction: float = Field(0.03, ge=0, le=1, description="of all steps")
    schedule: Literal["linear", "cosine", "constant_with_warmup", "cosine_with_min_lr"] = Field(
        "cosine", description="of the learning rate after the warm-up (cosine_with_min_lr: to 10 %)"
    )
    max_grad_norm: float = Field(1.0, ge=0, description="gradients are clipped to it; 0: never")


class TrainingConfig(Section):
    num_epochs: int = Field(1, gt=0, description="passes over the training pairs")
    max_steps: int | None = Field(None, gt=0, description="optimizer steps, instead of num_epochs")
    global_batch_pairs: int = Field(64, gt=0, description="pairs in one optimizer step")
    micro_batch_pairs: int = Field(8, gt=0, description="pairs in one forward pass of a worker")
    seed: int = Field(0, ge=0, description="of the head's first weights and the order of pairs")
    use_margin: bool = Field(
        True, description="subtract the margin column in the loss where there is one"
    )


class DistributedConfig(Section):
    num_workers: int = Field(1, gt=0, description="Ray Train workers, one device each")
    zero_stage: int = Field(
        2,
        ge=0,
        le=3,
        description="DeepSpeed ZeRO shards 0: nothing, 1: the optimizer's state, 2: gradients "
        "too, 3: weights too",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto: cuda if the cluster has a GPU for each worker"
    )
    cpus_per_worker: float = Field(1.0, gt=0, description="logical CPUs, and threads, of a worker")
    max_failures: int = Field(
        0, ge=-1, description="restarts from the last checkpoint after a lost worker; -1: no end"
    )


class CheckpointConfig(Section):
    every_steps: int = Field(200, gt=0, description="steps from one checkpoint to the next")
    # Two: if the newest turns out to be damaged there is one to fall back to.
    num_to_keep: int = Field(2, ge=2, description="checkpoints kept, the newest ones")


class TrainConfig(Section):
    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig
    training: TrainingConfig
    distributed: DistributedConfig
    checkpoint: CheckpointConfig
    output_dir: str = Field(
        "outputs/reward-model",
        min_length=1,
        description="where checkpoints, the log and the export go",
    )

    @model_validator(mode="after")
    def _batches_fit(self) -> TrainConfig:
        batch, micro = self.training.global_batch_pairs, self.training.micro_batch_pairs
        workers = self.distributed.num_workers
        if workers > batch:
            raise ValueError(
                f"distributed.num_workers is {workers} but training.global_batch_pairs only "
                f"{batch}: some workers would have no pair; use at most {batch} workers"
            )
        if micro > batch:
            raise ValueError(
                f"training.micro_batch_pairs is {micro}, more than training.global_batch_pairs "
                f"({batch}); use at most {max(1, batch // workers)}"
            )
        return self


def load_config(path: str | None, overrides: Sequence[tuple[str, str]] = ()) -> TrainConfig:
    """The YAML file at `path` with dotted keys replaced, in order, by `overrides`.

    Raises ValueError for a file that cannot be read, and for every key that is unknown (naming the
    nearest one), missing or wrong.
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
        place[leaf] = None if value.lower() in ("none", "null") else value
    return validate(TrainConfig, data, source=path or "")


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
    parser.add_argument("--config", metavar="FILE", help="YAML file with the settings below")
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
    if getattr(annotation, "__origin__", None) is Literal:
        return "|".join(annotation.__args__)  # type: ignore[union-attr]
    for kind, shown in ((bool, "BOOL"), (int, "INT"), (float, "FLOAT")):
        if kind is annotation or kind in getattr(annotation, "__args__", ()):
            return shown
    return "TEXT"
