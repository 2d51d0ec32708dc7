"""The private names of DeepSpeed that are used are where they were.

What those of NAMES do is tested where it is used: test_zero.py, test_elastic.py,
test_optimizers_workers.py.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engines import settings, trainer

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


def loading(model: Path) -> list[bool]:
    """Whether the universal format is read before, while and after it is asked for."""
    from trainer.deepspeed_internals import universal_loading
    from trainer.network import zero

    engine = trainer(settings(model)).engine
    found = [engine.load_universal_checkpoint()]
    with universal_loading(engine, True):
        found.append(engine.load_universal_checkpoint())
    found.append(engine.load_universal_checkpoint())
    zero.release(engine)
    return found


def test_the_universal_format_is_read_for_a_while(on_workers: OnWorkers, base_model: Path) -> None:
    assert on_workers(1, loading, base_model) == [[False, True, False]]


def adam_states(model: Path) -> list[int]:
    """How many parameters have a state before and after a step."""
    from trainer.network import zero

    built = trainer(settings(model, model__dtype="bfloat16", distributed__zero_stage=0))
    found = [len(built.engine.optimizer.optimizer.state)]
    built.step(0)
    found.append(len(built.engine.optimizer.optimizer.state))
    zero.release(built.engine)
    return found


def test_the_state_of_adam_begins_with_the_first_step(
    on_workers: OnWorkers, base_model: Path
) -> None:
    [[before, after]] = on_workers(1, adam_states, base_model)
    assert before == 0 < after


def saved(model: Path, folder: Path) -> list[Any]:
    """The files of a checkpoint, and the kinds of errors where the largest cannot be written."""
    from trainer.deepspeed_internals import write_errors
    from trainer.network import zero

    engine = trainer(settings(model, distributed__zero_stage=1)).engine
    with write_errors(engine) as none:
        zero.save(engine, folder, "whole")
    (folder / "broken" / "mp_rank_00_model_states.pt").mkdir(parents=True)  # in the file's place
    with write_errors(engine) as errors:
        zero.save(engine, folder, "broken")
    zero.release(engine)
    files = sorted(path.name for path in folder.rglob("*") if path.is_file())
    return [len(none), files, [isinstance(error, OSError | RuntimeError) for error in errors]]


def test_errors_of_the_writer_are_collected(
    on_workers: OnWorkers, base_model: Path, tmp_path: Path
) -> None:
    [[num_errors, files, are_errors]] = on_workers(1, saved, base_model, tmp_path)
    assert num_errors == 0
    assert "mp_rank_00_model_states.pt" in files
    assert not [name for name in files if name.endswith(".py")], "no recovery script"
    assert are_errors == [True]


def matrices(model: Path, stage: int) -> tuple[int, int, bool]:
    """How many parameters are empty, how many of those are whole by `whole_shape`, and whether
    DeepSpeed has heard of matrices for Muon."""
    from trainer.deepspeed_internals import muon_overflows, whole_shape
    from trainer.network import zero

    changes = {"optimizer__name": "muon", "optimizer__max_grad_norm": 0}
    engine = trainer(settings(model, distributed__zero_stage=stage, **changes)).engine
    empty = [p for p in engine.module.parameters() if not p.numel()]
    whole = [p for p in empty if whole_shape(p).numel()]
    hears = engine.optimizer.use_muon and any(engine.optimizer.sub_groups_using_muon)
    assert not muon_overflows(engine)
    zero.release(engine)
    return len(empty), len(whole), bool(hears)


def test_zero_3_knows_whole_shapes_and_what_muon_gets(
    on_workers: OnWorkers, base_model: Path
) -> None:
    [(num_empty, num_whole, hears)] = on_workers(1, matrices, base_model, 3)
    assert num_empty == num_whole > 0
    assert hears
