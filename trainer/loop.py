"""The training loop. It reads top to bottom: load, step, log, evaluate, save.

Runs on every Ray Train worker.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from torch import distributed as dist
from transformers.utils import logging as transformers_logging

from reward_actor.contract import ScoringContract
from trainer import finish, resume, zero
from trainer.config import TrainConfig
from trainer.prepare import TrainingData
from trainer.selection import Selection
from trainer.step import Trainer
from trainer.training_log import EVALUATIONS_FILE, LOG_FILE, TrainingLog, read_log


@dataclass(frozen=True)
class Job:
    """What the driver hands to every worker."""

    config: TrainConfig
    contract: ScoringContract
    data: ray.ObjectRef[TrainingData]
    num_steps: int
    facts: dict[str, Any]


def train(job: Job) -> dict[str, Any]:
    """Train, evaluate on the held-out pairs, export; the held-out metrics, on every worker."""
    config, output_dir = job.config, Path(job.config.output_dir)
    evaluation, checkpoint = config.evaluation, config.checkpoint
    _prepare_process(config.distributed.cpus_per_worker)

    trainer = Trainer(zero.initialize(config, job.num_steps), config, ray.get(job.data))
    run_dir = output_dir / resume.RUN_NAME
    start = resume.restore(trainer.engine, run_dir)
    log = TrainingLog(output_dir / LOG_FILE, start) if _is_first() else None
    evaluations = TrainingLog(output_dir / EVALUATIONS_FILE, start) if _is_first() else None
    selection = Selection(evaluation, _lines(output_dir / EVALUATIONS_FILE, start))
    step = start
    while step < job.num_steps and not selection.is_exhausted:
        metrics = trainer.step(step)
        step += 1
        is_best = False
        if evaluation.every_steps and step % evaluation.every_steps == 0:
            result = finish.evaluate_heldout(trainer)
            is_best = selection.add(step, result)
            if evaluations is not None:
                evaluations.write({"step": step, **result})
        if log is not None:
            log.write(metrics)
        is_last = step == job.num_steps or selection.is_exhausted
        is_kept = is_best and evaluation.keep_best
        if step % checkpoint.every_steps == 0 or is_last or is_kept:
            resume.save(trainer.engine, step, metrics, run_dir, checkpoint.num_to_keep, is_kept)
    if evaluation.keep_best and selection.best_step not in (None, step):
        step = resume.restore(trainer.engine, run_dir, selection.best_step)
    for file in (log, evaluations):
        if file is not None:
            file.close()
    return finish.finish(trainer, job.contract, {**job.facts, "num_steps": step})


def _lines(path: Path, step: int) -> list[dict[str, Any]]:
    """The lines of a log up to `step`, which the first worker reads, on every worker."""
    lines = [line for line in read_log(path) if line["step"] <= step] if _is_first() else []
    shared: list[Any] = [lines]
    dist.broadcast_object_list(shared, src=0)
    return list(shared[0])


def _is_first() -> bool:
    return dist.get_rank() == 0


def _prepare_process(cpus: float) -> None:
    torch.set_num_threads(max(1, int(cpus)))
    # DeepSpeed compiles with ninja, which may lie beside a Python that is not on the PATH.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    # Every worker's output lands on the user's terminal; ours comes from the driver.
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger().setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
