"""Several replicas on one GPU: what each may take of its memory."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from reward_actor.config_errors import validate
from reward_actor.engine.memory import allowed_bytes
from serve.config import ServeConfig

GIB = 2**30
CONTEXT = GIB // 2  # of CUDA, about: outside what PyTorch counts


@given(st.integers(1, 16), st.integers(4, 200))
def test_replicas_with_equal_shares_fit_on_a_gpu(num_replicas: int, total_gib: int) -> None:
    assume(total_gib / num_replicas > 1)
    allowed = allowed_bytes(total_gib * GIB, 1 / num_replicas)
    assert allowed > 0
    if num_replicas > 1:
        assert num_replicas * (allowed + CONTEXT) <= total_gib * GIB


def test_a_share_may_be_too_small_and_a_whole_gpu_is_not_limited() -> None:
    assert allowed_bytes(80 * GIB, 1.0) == 80 * GIB
    with pytest.raises(ValueError, match="leaves no room for a model"):
        allowed_bytes(4 * GIB, 0.1)


def test_vllm_engines_fit_beside_each_other() -> None:
    def share(**settings: object) -> float:
        return ServeConfig(model="m", engine="vllm", **settings).engine_memory_share

    assert share() == 0.9
    assert share(gpus_per_replica=0.5) == 0.45
    assert share(registry="models") == 0.45, "room for the model that is swapped in"
    assert share(gpus_per_replica=0.5, registry="models", gpu_memory_utilization=0.8) == 0.2
    assert share(tensor_parallel=4) == 0.9


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gpus_per_replica": 2}, "share of one GPU"),
        ({"tensor_parallel": 2}, "needs engine 'vllm'"),
        ({"engine": "vllm", "tensor_parallel": 2, "gpus_per_replica": 0.5}, "on one GPU"),
        ({"engine": "vllm", "cache_size": 5}, "vllm has its own"),
        ({"engine": "vllm", "attention": "padded"}, "vllm has its own"),
    ],
)
def test_settings_that_cannot_be_met_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        validate(ServeConfig, {"model": "m", **settings})
