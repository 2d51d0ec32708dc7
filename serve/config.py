"""Settings of the service. pydantic only: neither torch nor ray is imported here."""

from __future__ import annotations

from math import isfinite
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Positive = Annotated[int, Field(gt=0)]
PositiveSeconds = Annotated[float, Field(gt=0)]

LIMITS = (
    "max_batch_tokens",
    "cache_size",
    "max_queued_tokens",
    "max_queue_s",
    "max_request_tokens",
    "max_request_samples",
    "max_concurrent_requests",
    "body_limit_bytes",
    "request_timeout_s",
)


class ServeConfig(BaseModel):
    model_config = ConfigDict(extra="forbid")

    model: Annotated[str, Field(min_length=1, description="directory of the reward model")]
    name: str = Field(
        "", description="what callers see the model as until a hot swap; none: its run's name"
    )
    engine: Literal["forest", "vllm"] = Field(
        "forest", description="forest (ours) or vllm (its pooling engine, for several GPUs)"
    )
    trust_remote_code: bool = Field(False, description="run Python code found in the model")
    num_replicas: Positive = Field(1, description="reward model replicas, one device each")
    min_replicas: int | None = Field(
        None, ge=0, description="with max_replicas: scale by queued tokens, from as few as this"
    )
    max_replicas: Positive | None = Field(None, description="scale up to as many replicas as this")
    target_queue_s: PositiveSeconds = Field(
        2.0, description="scaling: seconds of queued work that each replica should have"
    )
    upscale_delay_s: float = Field(10.0, ge=0, description="scaling: how long a need must last")
    downscale_delay_s: float = Field(300.0, ge=0, description="scaling: how long it must be gone")
    num_ingress: Positive = Field(1, description="ingress replicas: HTTP, rendering, tokenising")
    device: str = Field("auto", description="auto (cuda where there is one), cpu or cuda")
    dtype: str = Field("auto", description="auto (the contract's), float32, bfloat16 or float16")
    tensor_parallel: Positive = Field(
        1, description="GPUs that share one model: a replica has as many (engine vllm)"
    )
    gpu_memory_utilization: float = Field(
        0.9,
        gt=0,
        le=1,
        description="share of a replica's part of a GPU that its vllm engine takes; with a "
        "registry half of that, so that a hot swap finds room beside it",
    )
    gpus_per_replica: float = Field(
        1.0, ge=0, description="GPU share of a replica, and of that GPU's memory, on a GPU"
    )
    cpus_per_replica: float = Field(1.0, gt=0, description="logical CPUs that a replica asks for")
    threads_per_replica: int = Field(
        0, ge=0, description="CPU threads of a replica; 0: this machine's cores over num_replicas"
    )
    attention: Literal["auto", "forest", "padded"] = Field(
        "auto", description="auto (the fastest exact one), forest (shared prefixes once) or padded"
    )
    max_batch_tokens: int = Field(
        0, ge=0, description="rows in one forward pass; 0: chosen from free memory"
    )
    target_batch_s: PositiveSeconds = Field(
        0.5, description="seconds that one batch should take at most, so that nobody waits longer"
    )
    cache_size: int = Field(
        0,  # fresh rollouts never come twice
        ge=0,
        description="sequences whose scores a replica keeps; 0: none",
    )
    drop_in_scores: Literal["reward", "raw_score"] = Field(
        "reward", description="what other systems' protocols are answered with"
    )
    error_reward: float | Literal["refuse"] = Field(
        "refuse",
        description="what these answer for a sample that cannot be scored; refuse: with an error",
    )
    functions: str | None = Field(
        None, description="Python file with reward functions of yours, run with every request"
    )
    registry: str | None = Field(
        None, description="directory of models by name, for hot swaps; none: no swaps"
    )
    token_file: str | None = Field(
        None, description="bearer tokens (see `rayward token`), read again when it changes"
    )
    allow_unauthenticated: bool = Field(
        False, description="serve other addresses than loopback without a token file"
    )
    tls_cert: str | None = Field(None, description="certificate chain in PEM, for HTTPS")
    tls_key: str | None = Field(None, description="its private key in PEM")
    max_queued_tokens: Positive = Field(
        1_000_000, description="tokens that wait at one ingress before it answers 429"
    )
    max_queue_s: PositiveSeconds = Field(
        60.0, description="seconds of work that wait at one ingress before it answers 429"
    )
    max_request_tokens: Positive = Field(1_000_000, description="tokens in one request")
    max_request_samples: Positive = Field(10_000, description="completions in one request")
    max_concurrent_requests: Positive = Field(
        4096, description="requests that one ingress holds before it answers 429"
    )
    body_limit_bytes: Positive = Field(64 * 2**20, description="size of one request's body")
    request_timeout_s: PositiveSeconds = Field(120.0, description="deadline of one request")
    swap_timeout_s: PositiveSeconds = Field(
        600.0, description="deadline of one hot swap, sleep or wake"
    )
    access_log: bool = Field(
        False, description="write a line of JSON for every request, without its text"
    )
    monitor_half_life: Positive = Field(
        20_000, description="rewards after which one counts half in the live distribution"
    )
    monitor_min_rewards: Positive = Field(
        500, description="rewards of a model before it is warned about"
    )
    monitor_max_drift: float = Field(
        0.25, gt=0, description="population stability index above which drift is warned about"
    )
    monitor_max_length_correlation: float = Field(
        0.5,
        ge=0,
        le=1,
        description="of reward and tokens; above it (and the held-out's): a warning",
    )
    monitor_max_extremes: float = Field(
        0.10,
        gt=0,
        le=1,
        description="share of rewards beyond nearly all held-out ones; above: same",
    )

    @field_validator("error_reward", mode="before")
    @classmethod
    def error_reward_is_finite(cls, value: object) -> object:
        try:
            is_right = value == "refuse" or isfinite(float(str(value)))
        except ValueError:
            is_right = False
        if not is_right:  # in one complaint, where pydantic has one for each type
            raise ValueError("it must be a finite number, or refuse")
        return value

    @model_validator(mode="after")
    def replicas_agree(self) -> ServeConfig:
        if self.min_replicas is not None and self.max_replicas is None:
            raise ValueError(
                "min_replicas needs max_replicas; num_replicas alone is a fixed number"
            )
        if self.max_replicas is not None and (self.min_replicas or 0) > self.max_replicas:
            raise ValueError("min_replicas is above max_replicas")
        return self

    @model_validator(mode="after")
    def tls_is_whole(self) -> ServeConfig:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key go together")
        return self

    @model_validator(mode="after")
    def only_vllm_is_parallel(self) -> ServeConfig:
        if self.tensor_parallel > 1 and self.engine != "vllm":
            raise ValueError(
                "tensor_parallel needs engine 'vllm'; ours keeps a model on one device"
            )
        if self.tensor_parallel > 1 and self.gpus_per_replica != 1:
            raise ValueError("gpus_per_replica is for a model on one GPU, without tensor_parallel")
        return self

    @model_validator(mode="after")
    def gpus_are_shared_or_whole(self) -> ServeConfig:
        if self.gpus_per_replica > 1:
            raise ValueError(
                "gpus_per_replica is a share of one GPU, at most 1; for several use engine 'vllm' "
                "and tensor_parallel"
            )
        return self

    @model_validator(mode="after")
    def vllm_has_its_own(self) -> ServeConfig:
        if self.engine == "vllm" and (self.cache_size or self.attention != "auto"):
            raise ValueError("cache_size and attention are for engine 'forest'; vllm has its own")
        return self

    @property
    def is_autoscaled(self) -> bool:
        return self.max_replicas is not None

    @property
    def engine_memory_share(self) -> float:
        """Of a whole GPU's memory: what one vllm engine takes, so that all of them fit."""
        num_engines = 2 if self.registry is not None else 1
        return self.gpu_memory_utilization * (self.gpus_per_replica or 1.0) / num_engines

    def limits(self) -> dict[str, float]:
        """Every limit that a caller can run into, for `/info`."""
        return {name: getattr(self, name) for name in LIMITS}
