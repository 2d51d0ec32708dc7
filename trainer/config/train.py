"""Settings of a training, and what of them does not fit together. pydantic only: neither torch nor
ray is imported here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from reward_actor.contract import check_template_args
from trainer.config.data import DataConfig, Section

# Beside the checkpoints: the base model of a training that was given none.
SCRATCH_DIR = "base"


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
    plain_content: bool = Field(
        True,
        description="a special token that a message spells is text; false: it is that token, so "
        "that a completion can end its own turn",
    )
    template_args: dict[str, Any] = Field(
        {},
        description="arguments of the chat template where a row or request does not give its own, "
        "such as {enable_thinking: false}; the export keeps them",
    )
    max_length: int | None = Field(
        None, ge=64, description="tokens in a sequence; none: what the model allows, at most 2048"
    )
    head_init: Literal["inverse_sqrt", "inverse", "initializer_range", "zero"] = Field(
        "inverse_sqrt",
        description="standard deviation of a new head: 1/sqrt(hidden + 1), 1/(hidden + 1), the "
        "config's initializer_range, or 0",
    )
    freeze: list[str] = Field(
        [], description="regular expressions; parameters whose name matches one are not trained"
    )
    gradient_checkpointing: bool = Field(
        False, description="compute activations again in the backward pass instead of keeping them"
    )

    @field_validator("template_args")
    @classmethod
    def _json(cls, args: dict[str, Any]) -> dict[str, Any]:
        check_template_args(args)
        return args

    @field_validator("freeze")
    @classmethod
    def _patterns(cls, patterns: list[str]) -> list[str]:
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
        return patterns


class AdapterConfig(Section):
    """LoRA (Hu et al., arXiv:2106.09685) through PEFT; the export has it merged."""

    rank: int = Field(0, ge=0, description="of the LoRA matrices; 0: train the network itself")
    alpha: float = Field(32.0, gt=0, description="the update is scaled by alpha / rank")
    targets: list[str] = Field(
        ["all-linear"], min_length=1, description="names of the layers that get an adapter"
    )
    quantize: Literal["4bit"] | None = Field(
        None, description="keep the frozen weights in 4 bits (QLoRA; needs bitsandbytes)"
    )


class LossConfig(Section):
    """See `trainer.loss` for the formulas and their sources."""

    kind: Literal["bradley_terry", "log_exp"] = Field(
        "bradley_terry", description="of pairs; log_exp is OpenRLHF's name for it"
    )
    use_margin: bool = Field(
        True, description="subtract the margin column in the loss where there is one"
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="probability that a pair is labelled the wrong way round"
    )
    center_rewards_coefficient: float = Field(
        0.0,
        ge=0,
        description="times the mean of (reward_chosen + reward_rejected)^2",
    )
    ties: Literal["rao_kupper", "davidson"] = Field(
        "rao_kupper", description="the model of pairs marked as ties"
    )
    tie_parameter: float = Field(
        1.0, gt=0, description="log theta of Rao-Kupper, or nu of Davidson: larger, more ties"
    )
    attributes: dict[str, float] = Field(
        {}, description="{name: weight}: a regression head for each; the reward is their "
        "weighted sum"
    )  # fmt: skip
    attribute_coefficient: float = Field(
        1.0, ge=0, description="times the squared error of the attributes"
    )
    router_coefficient: float | None = Field(
        None,
        ge=0,
        description="times the load-balancing loss of a mixture of experts; none: what the "
        "model's config says",
    )


class OptimizerConfig(Section):
    name: Literal["adamw", "adamw_8bit", "muon"] = Field(
        "adamw", description="adamw_8bit needs bitsandbytes; muon: for the body's matrices"
    )
    learning_rate: float = Field(9e-6, gt=0, description="at its peak, after the warm-up")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay of all parameters")
    beta1: float = Field(0.9, ge=0, lt=1, description="decay of the running mean; muon's momentum")
    beta2: float = Field(0.95, ge=0, lt=1, description="decay of its running square")
    epsilon: float = Field(1e-8, gt=0, description="added to the denominator")
    warmup_fraction: float = Field(0.03, ge=0, le=1, description="of all steps")
    schedule: str = Field(
        "cosine",
        description="of the learning rate after the warm-up: any of transformers.SchedulerType",
    )
    schedule_args: dict[str, Any] = Field(
        {}, description="its further arguments, such as {min_lr_rate: 0.1}"
    )
    max_grad_norm: float = Field(1.0, ge=0, description="gradients are clipped to it; 0: never")


class TrainingConfig(Section):
    num_epochs: int = Field(1, gt=0, description="passes over the training pairs")
    max_steps: int | None = Field(None, gt=0, description="optimizer steps, instead of num_epochs")
    global_batch_pairs: int = Field(
        64, gt=0, description="pairs (or rankings, or rows with attributes) in one optimizer step"
    )
    micro_batch_tokens: int = Field(
        8192,
        gt=0,
        description="tokens in one forward pass of a worker, shared prefixes counted once; more "
        "only for a pair that is longer by itself",
    )
    packing: Literal["auto", "forest", "padded"] = Field(
        "auto", description="forest: compute shared prefixes once; auto: where that is exact"
    )
    token_noise: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of the tokens that a step replaces by random ones of the training "
        "data, other ones each time; against learning few texts by heart",
    )
    seed: int = Field(
        0, ge=0, description="of the head's first weights, the order of pairs, token noise"
    )


class EvaluationConfig(Section):
    every_steps: int | None = Field(
        None, gt=0, description="steps from one evaluation to the next; none: only at the end"
    )
    metric: str = Field(
        "accuracy",
        description="of the held-out pairs: decides which checkpoint is the best; "
        "rmse_NAME for the error of an attribute",
    )
    keep_best: bool = Field(
        False, description="export the checkpoint with the best metric instead of the last one"
    )
    patience: int | None = Field(
        None, gt=0, description="stop after so many evaluations without a better metric"
    )
    asynchronous: bool = Field(
        False, description="evaluate checkpoints in a Ray task of their own while training goes on"
    )
    normalise: bool = Field(
        True, description="give the export's rewards mean 0 and standard deviation 1, measured on "
        "the held-out pairs"
    )  # fmt: skip


class DistributedConfig(Section):
    num_workers: int = Field(1, gt=0, description="Ray Train workers, one device each")
    min_workers: int | None = Field(
        None,
        gt=0,
        description="start, and resume, with fewer workers down to so many while the cluster has "
        "no room for all; none: wait for all",
    )
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
        3, ge=-1, description="restarts from the last checkpoint after a lost worker; -1: no end"
    )
    offload_optimizer: bool = Field(
        False, description="keep the optimizer's state in the host's memory (ZeRO 1 to 3)"
    )
    offload_parameters: bool = Field(
        False, description="keep the weights in the host's memory (ZeRO 3)"
    )
    zeropp_quantized_weights: bool = Field(
        False, description="ZeRO++: gather weights in 8 bits (ZeRO 3, GPU)"
    )
    zeropp_quantized_gradients: bool = Field(
        False, description="ZeRO++: reduce gradients in 4 bits (ZeRO 3, GPU)"
    )
    zeropp_partition_size: int = Field(
        1,
        ge=1,
        description="ZeRO++: a second copy of the weights in every so many workers",
    )
    deepspeed: dict[str, Any] = Field(
        {}, description="merged into DeepSpeed's configuration, over everything else"
    )


class CheckpointConfig(Section):
    every_steps: int = Field(200, gt=0, description="steps from one checkpoint to the next")
    # Two: if the newest turns out to be damaged there is one to fall back to.
    num_to_keep: int = Field(2, ge=2, description="checkpoints kept, the newest ones")
    storage_path: str | None = Field(
        None,
        description="where they are kept, such as s3://bucket/runs; none: below output_dir",
    )
    asynchronous: bool = Field(True, description="store them while training goes on")


class ReportConfig(Section):
    trackers: list[Literal["wandb", "tensorboard", "mlflow"]] = Field(
        [], description="where the metrics go besides training_log.jsonl"
    )
    project: str = Field("rayward", min_length=1, description="the trackers' project")
    run_name: str | None = Field(None, description="there; none: the name of output_dir")
    push_to_hub: str | None = Field(
        None, description="repository on the Hugging Face hub that gets the export"
    )
    hub_private: bool = Field(True, description="make that repository private")
    push_report: bool = Field(
        False,
        description="push report.html and resolved_config.json, too: they hold texts of held-out "
        "pairs and the names of local directories",
    )


class TrainConfig(Section):
    model: ModelConfig
    adapter: AdapterConfig
    data: DataConfig
    loss: LossConfig
    optimizer: OptimizerConfig
    training: TrainingConfig
    evaluation: EvaluationConfig
    distributed: DistributedConfig
    checkpoint: CheckpointConfig
    report: ReportConfig
    output_dir: str = Field(
        "outputs/reward-model",
        min_length=1,
        description="where checkpoints, the log and the export go",
    )

    @property
    def is_from_scratch(self) -> bool:
        """Whether the network to start from is not a given one; also after `resolve_paths`."""
        path = self.model.path
        return path is None or Path(path) == Path(self.output_dir) / SCRATCH_DIR

    @property
    def tied_to_workers(self) -> str | None:
        """Why a run cannot go on with another number of workers, or None if it can."""
        if self.optimizer.name != "adamw":
            return f"the state of optimizer.name {self.optimizer.name} belongs to its workers"
        if self.distributed.zeropp_partition_size > 1:
            return "distributed.zeropp_partition_size belongs to a number of workers"
        return None

    @model_validator(mode="after")
    def _fits(self) -> TrainConfig:
        if complaints := self._misfits():
            raise ValueError("; ".join(complaints))
        return self

    def _misfits(self) -> list[str]:
        batch, workers = self.training.global_batch_pairs, self.distributed.num_workers
        stage, wrong = self.distributed.zero_stage, []
        if self.model.template_args and self.model.format == "text":
            wrong.append("model.template_args needs model.format chat, not text")
        if workers > batch:
            wrong.append(
                f"distributed.num_workers is {workers} but training.global_batch_pairs only "
                f"{batch}: some workers would have no pair; use at most {batch} workers"
            )
        if self.data.fold is not None and self.data.eval is not None:
            wrong.append("data.fold and data.eval both say what is held out: omit one")
        least = self.distributed.min_workers
        if least is not None and least > workers:
            wrong.append(f"distributed.min_workers is {least}, more than num_workers ({workers})")
        if least is not None and self.tied_to_workers:
            wrong.append(f"distributed.min_workers cannot be used: {self.tied_to_workers}")
        if least is not None and self.evaluation.asynchronous:
            wrong.append(
                "evaluation.asynchronous needs a place beside the workers, and with "
                "distributed.min_workers they take every place that there is: leave one of the two "
                "away"
            )
        if self.distributed.offload_optimizer and stage == 0:
            wrong.append("distributed.offload_optimizer needs distributed.zero_stage 1, 2 or 3")
        for name in (
            "offload_parameters", "zeropp_quantized_weights", "zeropp_quantized_gradients"
        ):  # fmt: skip
            if getattr(self.distributed, name) and stage != 3:
                wrong.append(f"distributed.{name} needs distributed.zero_stage 3, not {stage}")
        size = self.distributed.zeropp_partition_size
        if size > 1 and (stage != 3 or workers % size):
            wrong.append(
                f"distributed.zeropp_partition_size is {size}: it needs distributed.zero_stage 3 "
                f"and must divide distributed.num_workers ({workers})"
            )
        if self.adapter.quantize and not self.adapter.rank:
            wrong.append("adapter.quantize freezes the network: set adapter.rank to train adapters")
        if self.adapter.quantize and stage == 3:
            wrong.append("adapter.quantize needs distributed.zero_stage 0, 1 or 2")
        if self.distributed.offload_optimizer and self.optimizer.name != "adamw":
            wrong.append(
                f"distributed.offload_optimizer works with optimizer.name adamw, not "
                f"{self.optimizer.name}"
            )
        if urlsplit(self.checkpoint.storage_path or "").password is not None:
            wrong.append(
                "checkpoint.storage_path holds a password, which reports and logs would show: give "
                "it by the environment instead, AWS_SECRET_ACCESS_KEY for s3://"
            )
        for name in ("patience", "keep_best", "asynchronous"):
            if getattr(self.evaluation, name) and not self.evaluation.every_steps:
                wrong.append(f"evaluation.{name} needs evaluation.every_steps")
        return wrong
