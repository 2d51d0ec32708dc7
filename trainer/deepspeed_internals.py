"""Every private or undocumented name of DeepSpeed that the trainer uses, as of 0.19.8.

tests/trainer/test_deepspeed_internals.py fails when a new version has moved one.
"""

from __future__ import annotations

import contextlib
import io
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Iterator

    from deepspeed import DeepSpeedEngine


def disable_shared_memory_op() -> None:
    """Do without the all-reduce for CPUs, which compiles for a minute; of a worker that is killed
    it leaves 66 MiB in /dev/shm, or a lock for which every later one waits."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def clear_adam_state(engine: DeepSpeedEngine) -> None:
    """Forget the step with zero gradients by which DeepSpeed makes Adam's state without ZeRO and in
    bfloat16; it would count as one in the bias correction."""
    engine.optimizer.optimizer.state.clear()


@contextlib.contextmanager
def universal_loading(engine: DeepSpeedEngine, enabled: bool) -> Iterator[None]:
    """Let `load_checkpoint` read the universal format while this lasts, if `enabled`."""
    engine._config.load_universal_checkpoint = enabled
    try:
        yield
    finally:
        engine._config.load_universal_checkpoint = False


@contextlib.contextmanager
def write_errors(engine: DeepSpeedEngine) -> Iterator[list[Exception]]:
    """Errors of DeepSpeed's writer go into a list: a worker that cannot write would otherwise leave
    `save_checkpoint` before the others, who would wait for it at the next barrier for ever."""
    writer = engine.checkpoint_engine
    errors: list[Exception] = []
    write = writer.save

    def save(state_dict: Any, path: str) -> None:
        try:
            write(state_dict, path)
        except (OSError, RuntimeError) as error:
            errors.append(error)

    writer.save = save
    engine._copy_recovery_script = lambda _: None  # a file that nothing here reads
    try:
        yield errors
    finally:
        del writer.save, engine._copy_recovery_script


def to_universal(source: Path, target: Path) -> None:
    """Write a checkpoint's tag folder in the universal format. Raises whatever DeepSpeed does."""
    from deepspeed.checkpoint import ds_to_universal

    settings = Namespace(
        input_folder=str(source),
        output_folder=str(target),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    quiet = io.StringIO()
    with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        ds_to_universal.main(settings)


def whole_state(folder: Path, tag: str, zero_stage: int) -> dict[str, Tensor]:
    """The weights of a checkpoint whose digests were checked: it is read by pickle."""
    if zero_stage == 3:  # each worker has stored a part of the float32 weights
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        return dict(
            get_fp32_state_dict_from_zero_checkpoint(
                str(folder), tag, exclude_frozen_parameters=True
            )
        )
    path = folder / tag / "mp_rank_00_model_states.pt"
    state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=False)["module"]
    return state


def muon_class() -> Any:
    """DeepSpeed's Muon, which ZeRO gives whole matrices: those that `mark_for_muon` has marked."""
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    return MuonWithAuxAdam


def mark_for_muon(parameter: nn.Parameter, is_matrix: bool) -> None:
    parameter.use_muon = is_matrix  # type: ignore[attr-defined]


def muon_overflows(engine: DeepSpeedEngine) -> bool:
    """Whether a gradient is not finite, before the step: under Muon, ZeRO 3 would first add the
    finite gradients of other matrices to their momentum. False for every other optimizer."""
    return bool(getattr(engine.optimizer, "use_muon", False) and engine.optimizer.has_overflow())


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """The shape of a parameter that ZeRO 3 may have divided: its own is empty then."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape
