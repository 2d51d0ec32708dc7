"""The training loop. It reads top to bottom: load, step, log, evaluate, save.

Runs on every Ray Train worker.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
import torch
from transformers.utils import logging as transformers_logging

from trainer import finish
from trainer.checkpoints.checkpoints import Checkpoints
from trainer.checkpoints.manifest import check_not_lost
from trainer.checkpoints.storage import checkpoint_storage
from trainer.console import say
from trainer.evaluation.background import MAX_PENDING, Validations
from trainer.evaluation.metrics import is_measurable
from trainer.evaluation.selection import Selection
from trainer.job import Job
from trainer.log import EVALUATIONS_FILE, LOG_FILE, TrainingLog, read_log
from trainer.network import zero
from trainer.network.collectives import from_first, is_first
from trainer.step import Stepper


def training_loop(job: Job) -> dict[str, Any]:
    """Train, evaluate on the held-out pairs, export; the held-out metrics, on every worker."""
    config, output_dir = job.config, Path(job.config.output_dir)
    evaluation, checkpoint = config.evaluation, config.checkpoint
    _prepare_process(config.distributed.cpus_per_worker)

    trainer = Stepper(zero.initialize(config, job.num_steps), config, ray.get(job.data))
    if is_first():
        say(f"path: {trainer.forward.described}")
    checkpoints = Checkpoints(trainer.engine, config)
    start = checkpoints.restore()
    if not start:  # also after a restart that the command which began the run knows nothing of
        storage = checkpoint_storage(config)
        check_not_lost(storage, output_dir / LOG_FILE, checkpoint.every_steps)
    log = TrainingLog(output_dir / LOG_FILE, start) if is_first() else None
    evaluations = TrainingLog(output_dir / EVALUATIONS_FILE, start) if is_first() else None
    before = _lines(output_dir / EVALUATIONS_FILE, start)
    selection = Selection(evaluation, before)
    every_steps = evaluation.every_steps if is_measurable(trainer.data.heldout) else None

    def is_due(step: int) -> bool:
        """Whether the held-out data is evaluated after it; `finish` does that at the end, too."""
        is_compared = step == job.num_steps and evaluation.keep_best
        return bool(every_steps and (step % every_steps == 0 or is_compared))

    validations = None
    if evaluation.asynchronous and every_steps:
        validations = Validations(checkpoints, is_due, [line["step"] for line in before])

    def select(results: Sequence[tuple[int, dict[str, Any]]]) -> bool:
        """Write results down; whether the last of them is the best so far."""
        is_best = False
        for at, result in results:
            is_best = selection.add(at, result)
            if evaluations is not None:
                evaluations.write({"step": at, **result})
            if is_best and evaluation.keep_best and validations is not None:
                checkpoints.best = at
        checkpoints.also_keep = validations.steps if validations is not None else set()
        return is_best

    if evaluation.keep_best:
        checkpoints.best = selection.best_of(state.step for state in checkpoints.stored().states)
    step = start
    while step < job.num_steps and not selection.is_exhausted:
        metrics = trainer.step(step)
        step += 1
        is_best = False
        if validations is not None:
            if is_due(step):
                validations.want(step)
            select(validations.wait(at_most=MAX_PENDING))
        elif is_due(step):
            is_best = select([(step, finish.evaluate_heldout(trainer))]) and evaluation.keep_best
        if log is not None:
            log.write(metrics)
        is_last = step == job.num_steps or selection.is_exhausted
        is_wanted = is_best or (is_due(step) and validations is not None)
        if step % checkpoint.every_steps == 0 or is_last or is_wanted:
            checkpoints.save(step, is_best)
        checkpoints.poll()
    checkpoints.wait()
    if validations is not None:
        select(validations.wait())
    if evaluation.keep_best and selection.best_step != step and checkpoints.best is not None:
        step = checkpoints.restore(checkpoints.best) or step
    checkpoints.close()
    for file in (log, evaluations):
        if file is not None:
            file.close()
    failed = {"num_failed_checkpoints": checkpoints.num_failed}
    return finish.finish(trainer, job.contract, {**job.facts, **failed, "num_steps": step})


def _lines(path: Path, step: int) -> list[dict[str, Any]]:
    """The lines of a log up to `step`, which the first worker reads, on every worker."""
    return from_first(
        [line for line in read_log(path) if line["step"] <= step] if is_first() else []
    )


def _prepare_process(cpus: float) -> None:
    torch.set_num_threads(max(1, int(cpus)))
    # DeepSpeed compiles with ninja, which may lie beside a Python that is not on the PATH.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    # Every worker's output lands on the user's terminal; ours comes from the driver.
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger().setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
