"""The training loop. It reads top to bottom: load, step, log, evaluate, save.

Runs on every Ray Train worker.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import torch
from transformers.utils import logging as transformers_logging

from reward_actor.terminal import say
from trainer.checkpoints.checkpoints import Checkpoints
from trainer.evaluation.evaluations import Evaluations
from trainer.finish import finish
from trainer.job import Job
from trainer.log import LOG_FILE, TrainingLog
from trainer.network import zero
from trainer.network.collectives import is_first
from trainer.step import Stepper


def training_loop(job: Job) -> dict[str, Any]:
    """Train, evaluate on the held-out pairs, export; the result, on every worker: see `finish`."""
    config, num_steps = job.config, job.facts.num_steps
    _prepare_process(config.distributed.cpus_per_worker)
    if is_first():
        say("loading the network")
    trainer = Stepper(zero.initialize(config, num_steps), config, ray.get(job.data))
    if is_first():
        say(f"path: {trainer.forward.described}")
    checkpoints = Checkpoints(trainer.engine, config)
    step = checkpoints.restore()
    log = TrainingLog(Path(config.output_dir) / LOG_FILE, step) if is_first() else None
    evaluations = Evaluations(trainer, checkpoints, num_steps, step)
    while step < num_steps and not evaluations.is_exhausted:
        metrics = trainer.step(step)
        step += 1
        is_wanted = evaluations.after(step)
        if log is not None:
            log.write(metrics)
        is_last = step == num_steps or evaluations.is_exhausted
        if is_wanted or is_last or step % config.checkpoint.every_steps == 0:
            checkpoints.save(step)
        checkpoints.poll()
    checkpoints.wait()
    evaluations.close()
    if checkpoints.best is not None and evaluations.best_step != step:
        step = checkpoints.restore(checkpoints.best) or step
    checkpoints.close()
    if log is not None:
        log.close()
    done = replace(job.facts, num_steps=step, num_failed_checkpoints=checkpoints.num_failed)
    return finish(trainer, job.contract, done, job.baselines)


def _prepare_process(cpus: float) -> None:
    torch.set_num_threads(max(1, int(cpus)))
    # DeepSpeed compiles with ninja, which may lie beside a Python that is not on the PATH.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    # Every worker's output lands on the user's terminal; ours comes from the driver.
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger().setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
