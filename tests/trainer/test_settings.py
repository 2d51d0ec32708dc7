"""DeepSpeed's settings, made from ours and checked by DeepSpeed's own rules; nothing is trained."""

from __future__ import annotations

from typing import Any

import pytest
from engines import settings

from trainer.network.zero_settings import check_settings, deepspeed_config


def made(**changes: Any) -> dict[str, Any]:
    """DeepSpeed's settings, which DeepSpeed itself accepts."""
    config = settings("unread", **changes)
    check_settings(config)
    return deepspeed_config(config)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "muon"])
def test_deepspeed_accepts_every_stage_dtype_and_optimizer(
    stage: int, dtype: str, optimizer: str
) -> None:
    result = made(distributed__zero_stage=stage, model__dtype=dtype, optimizer__name=optimizer)
    assert result["zero_optimization"]["stage"] == stage
    assert result["bf16"] == {"enabled": dtype == "bfloat16"}
    assert result["zero_allow_untested_optimizer"] == (optimizer == "adamw_8bit")


def test_a_loss_is_divided_by_nothing_but_the_number_of_workers() -> None:
    result = made(optimizer__max_grad_norm=0.5)
    assert result["gradient_accumulation_steps"] == 1
    assert result["gradient_clipping"] == 0.5


@pytest.mark.parametrize(
    ("stage", "switch", "key", "value"),
    [
        (1, "offload_optimizer", "offload_optimizer", {"device": "cpu", "pin_memory": False}),
        (3, "offload_parameters", "offload_param", {"device": "cpu", "pin_memory": False}),
        (3, "zeropp_quantized_weights", "zero_quantized_weights", True),
        (3, "zeropp_quantized_gradients", "zero_quantized_gradients", True),
        (3, "zeropp_partition_size", "zero_hpz_partition_size", 2),
    ],
)
def test_a_switch_sets_deepspeeds_key_and_is_off_by_default(
    monkeypatch: pytest.MonkeyPatch, stage: int, switch: str, key: str, value: Any
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    base = {"distributed__zero_stage": stage, "distributed__num_workers": 4}
    assert key not in made(**base)["zero_optimization"]
    on = 2 if switch.endswith("size") else True
    assert made(**base, **{f"distributed__{switch}": on})["zero_optimization"][key] == value


def test_the_raw_block_is_merged_deep_and_wins() -> None:
    raw = "{zero_optimization: {reduce_bucket_size: 1000, overlap_comm: true}, dump_state: true}"
    result = made(distributed__deepspeed=raw)
    assert result["zero_optimization"]["reduce_bucket_size"] == 1000
    assert result["zero_optimization"]["stage"] == 2
    assert result["dump_state"] is True


@pytest.mark.parametrize(
    ("raw", "complaint"),
    [
        ("{train_batch_size: 8}", "decided by training.global_batch_pairs: set that instead"),
        ("{gradient_clipping: 2}", "decided by optimizer.max_grad_norm"),
        ("{bf16: {enabled: false}}", "decided by model.dtype"),
        ("{zero_optimization: {stage: 1}}", "decided by distributed.zero_stage"),
        ("{data_types: {grad_accum_dtype: bf16}}", "decided by the training loop$"),
        ("{gradient_allreduce_op: sum}", "decided by the training loop$"),
        ("{zero_optimization: 2}", "zero_optimization is 2, not a section"),
        ("{prescale_gradient: true}", "no such setting; did you mean prescale_gradients"),
        ("{activation_chekpointing: {}}", "no such setting; did you mean activation_checkpointing"),
        ("{zero_optimization: {reduce_buckt_size: 5}}", "reduce_buckt_size"),
        ("{zero_optimization: {reduce_bucket_size: lots}}", "reduce_bucket_size"),
        ("{zero_optimization: {offload_optimizer: {device: moon}}}", "moon"),
    ],
)
def test_what_the_raw_block_may_not_hold_is_refused(raw: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        check_settings(settings("unread", distributed__deepspeed=raw))
