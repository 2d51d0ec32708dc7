"""`train(config)`: from a config to an exported reward model, on a Ray cluster."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reward_actor import terminal
from reward_actor.sources import check_source, is_file_name
from trainer.checkpoints.manifest import stored_steps
from trainer.checkpoints.run_directory import EXPORT_DIR, finished, locked
from trainer.checkpoints.run_identity import check_identity, identity
from trainer.checkpoints.storage import checkpoint_storage
from trainer.config.data import Source
from trainer.config.train import SCRATCH_DIR, TrainConfig
from trainer.data.micro_batches import steps_per_epoch
from trainer.data.prepare import prepare
from trainer.evaluation.metrics import check_metric
from trainer.evaluation.selection import check_selection
from trainer.report import hub
from trainer.report.tracking import check_trackers


@dataclass(frozen=True)
class TrainResult:
    """`metrics` are `heldout_*` numbers, None where one is not defined, and three tables
    (`heldout_subsets`, `heldout_baselines`, `heldout_calibration_bins`); empty when nothing was
    held out."""

    export_dir: Path
    steps: int
    num_pairs: int
    metrics: dict[str, Any]
    seconds: float


def train(config: TrainConfig, say: Callable[[str], None] = terminal.say) -> TrainResult:
    """Train and export; resumes from the last checkpoint of the same run in `output_dir`.

    Raises ValueError for a config, data or a cluster that cannot work, before any training;
    TrainingError if the training itself fails. An interrupt leaves the last checkpoint usable.
    """
    began = time.perf_counter()
    _check(config)
    config = resolve_paths(config)
    output_dir = Path(config.output_dir)
    with terminal.phase("reading and rendering the data"):
        prepared, contract = prepare(config)
    check_selection(config.evaluation, config.loss.attributes, prepared.heldout)
    for line in prepared.report():
        say(line)
    training = config.training
    warnings = _step_warnings(prepared.num_used, training.global_batch_pairs)
    for warning in [*prepared.warnings, *warnings]:
        say(f"warning: {warning}")
    num_steps = training.max_steps or training.num_epochs * steps_per_epoch(
        prepared.num_used, training.global_batch_pairs
    )
    from trainer.network.optimizers import check_optimizer  # with torch, that `prepare` has loaded

    check_optimizer(config.optimizer, num_steps)
    check_identity(config, identity(config, prepared.digest()))
    with locked(output_dir):
        result = finished(output_dir)
        if result is None:
            start = stored_steps(config)
            if start:
                say(f"resuming after step {start} of {num_steps}")
            from trainer.ray_train import launch  # Ray is not needed, nor imported, before this

            result = launch(config, contract, prepared, num_steps, start, say)
        else:
            say("this run is finished already; nothing to do")
    export_dir = output_dir / EXPORT_DIR
    if config.report.push_to_hub:
        say(f"the export is at {hub.push(export_dir, config.report)}")
    metrics = {key: value for key, value in result.items() if key.startswith("heldout_")}
    seconds = round(time.perf_counter() - began, 1)
    return TrainResult(export_dir, int(result["num_steps"]), len(prepared.train), metrics, seconds)


def _step_warnings(num_used: int, global_batch_pairs: int) -> list[str]:
    """Of a batch that takes all of an epoch's `num_used` comparisons, or could take more."""
    if num_used > global_batch_pairs:
        return []
    what = "larger than" if num_used < global_batch_pairs else "all of"
    return [
        f"training.global_batch_pairs {global_batch_pairs} is {what} the {num_used} pairs of an "
        "epoch: every epoch is a single optimizer step; use a smaller batch, such as "
        f"{max(1, num_used // 20)}"
    ]


def _check(config: TrainConfig) -> None:
    """Raise ValueError for what would fail late: an unknown metric, a missing package."""
    try:
        check_metric(config.evaluation.metric, config.loss.attributes)
    except ValueError as error:
        raise ValueError(f"evaluation.metric: {error}") from None
    check_trackers(config.report)
    if config.adapter.rank:
        from trainer.network.adapters import check_adapter

        check_adapter(config.adapter)
    if config.distributed.deepspeed:  # our own settings need no check that takes seconds
        from trainer.network.zero_settings import check_settings

        check_settings(config)
    if config.report.push_to_hub:
        hub.check_push(config.report.push_to_hub)


def resolve_paths(config: TrainConfig) -> TrainConfig:
    """The config with absolute paths, since workers run in other directories. Reads no data.

    Raises ValueError for files that are missing and an output_dir that cannot be written, or that
    is relative inside a Ray job, whose working directory is deleted with the job.
    """
    output_dir = Path(config.output_dir).expanduser()
    # ray/_private/runtime_env/working_dir.py unpacks a job's working directory there.
    if not output_dir.is_absolute() and "working_dir_files" in Path.cwd().parts:
        raise ValueError(
            f"output_dir: {output_dir} is relative, but a Ray job's working directory is deleted "
            "when the job ends; give an absolute path on storage that all nodes share"
        )
    output_dir = output_dir.absolute()
    existing = next(path for path in (output_dir, *output_dir.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(f"output_dir: {output_dir} cannot be written ({existing} is in the way)")
    resolved = config.model_copy(deep=True)
    resolved.output_dir = str(output_dir)
    if config.model.path is None:
        resolved.model.path = str(output_dir / SCRATCH_DIR)
    else:
        resolved.model.path = _resolve_model(config.model.path)
    place = config.checkpoint.storage_path
    if place is not None and "://" not in place:
        path = Path(place).expanduser()
        if not path.is_absolute() and "working_dir_files" in Path.cwd().parts:
            raise ValueError(
                f"checkpoint.storage_path: {place} is relative, but a Ray job's working directory "
                "is deleted when the job ends; give an absolute path or a URI"
            )
        resolved.checkpoint.storage_path = str(path.absolute())
    checkpoint_storage(resolved)  # tells at once what is no place at all
    resolved.data.train = _resolve_sources(config.data.sources("train"), "data.train")
    if config.data.eval is not None:
        resolved.data.eval = _resolve_sources(config.data.sources("eval"), "data.eval")
    return resolved


def _resolve_sources(sources: Mapping[str, Source], field: str) -> dict[str, Source]:
    """The sources by absolute paths, or hub names as they are."""
    resolved: dict[str, Source] = {}
    for name, source in sources.items():
        check_source(name, field)
        path = str(Path(name).expanduser().absolute()) if is_file_name(name) else name
        if path in resolved:
            raise ValueError(f"{field}: {path} is there twice; give it a larger weight instead")
        if field == "data.eval" and source.weight != 1:
            raise ValueError(
                f"{field}: the weight of {name} is {source.weight:g}; an evaluation uses every "
                "row once"
            )
        resolved[path] = source
    return resolved


def _resolve_model(path: str) -> str:
    """An absolute directory that holds a model, or a Hugging Face name as it is."""
    model = Path(path).expanduser()
    if not (model.exists() or model.is_absolute() or path.startswith(".")):
        return path
    if not (model / "config.json").is_file():
        raise ValueError(f"model.path: {model.absolute()} is not a directory with a model")
    if not any(model.glob("*.safetensors")):
        raise ValueError(f"model.path: {model.absolute()} holds no .safetensors weights")
    return str(model.absolute())
