"""The private names of DeepSpeed that are used are where they were.

What they do is tested where it is used: test_zero.py, test_elastic.py, test_optimizers.py.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engines import OnWorkers

NAMES = [
    ("deepspeed.ops", "__compatible_ops__"),
    ("deepspeed.checkpoint.ds_to_universal", "main"),
    ("deepspeed.utils.zero_to_fp32", "get_fp32_state_dict_from_zero_checkpoint"),
    ("deepspeed.runtime.zero.muon.muon_optimizer", "MuonWithAuxAdam"),
]


def missing_names() -> list[str]:
    return [name for module, name in NAMES if not hasattr(import_module(module), name)]


def is_shared_memory_op_off() -> bool:
    import deepspeed

    from trainer.deepspeed_internals import disable_shared_memory_op

    assert "deepspeed_shm_comm" in deepspeed.ops.__compatible_ops__
    disable_shared_memory_op()
    return deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] is False


def test_they_are_still_there(on_workers: OnWorkers) -> None:
    assert on_workers(1, missing_names) == [[]]


def test_the_shared_memory_op_can_be_switched_off(on_workers: OnWorkers) -> None:
    assert on_workers(1, is_shared_memory_op_off) == [True]
