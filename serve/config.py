"""Settings of the service. pydantic only: neither torch nor ray is imported here."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]


class ServeConfig(BaseModel):
    model_config = ConfigDict(extra="forbid")

    model: Annotated[str, Field(min_length=1, description="directory of the reward model")]
    name: str = Field("", description="name under which callers see the model [its directory's]")
    num_replicas: Positive = Field(1, description="reward model replicas, one device each")
    num_ingress: Positive = Field(1, description="ingress replicas: HTTP, rendering, tokenising")
    device: str = Field("auto", description="auto, cpu, or cuda")
    dtype: str = Field("auto", description="auto (the contract's), float32, bfloat16 or float16")
    gpus_per_replica: float = Field(1.0, ge=0, description="GPU share of a replica, on a GPU")
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
    cache_size: int = Field(
        # Off: fresh rollouts never come twice, and what comes from the cache in no time would make
        # the queue look faster than the device is.
        0,
        ge=0,
        description="sequences whose scores a replica keeps; 0: none",
    )
    max_queued_tokens: Positive = Field(
        1_000_000, description="tokens that wait at one replica before it answers 429"
    )
    max_request_tokens: Positive = Field(1_000_000, description="tokens in one request")
    max_request_samples: Positive = Field(10_000, description="completions in one request")
    body_limit_bytes: Positive = Field(64 * 2**20, description="size of one request's body")
    request_timeout_s: float = Field(120.0, gt=0, description="deadline of one request")
    trust_remote_code: bool = Field(False, description="run Python code found in the model")

    def limits(self) -> dict[str, float]:
        """Every limit that a caller can run into, for `/info`."""
        names = (
            "max_batch_tokens",
            "cache_size",
            "max_queued_tokens",
            "max_request_tokens",
            "max_request_samples",
            "body_limit_bytes",
            "request_timeout_s",
        )
        return {name: getattr(self, name) for name in names}
