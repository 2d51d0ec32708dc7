"""The training loop. It reads top to bottom: load, step, log, save.

Runs on every Ray Train worker. Legend: P pairs of a forward pass, 2P sequences.
"""

from __future__ import annotations

import logging
import math
import os
import resource
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
import torch
from torch import Tensor
from torch import distributed as dist
from transformers.utils import logging as transformers_logging

from reward_actor.contract import ScoringContract
from trainer import finish, resume, zero
from trainer.batches import global_batch, micro_batches, steps_per_epoch
from trainer.config import TrainConfig
from trainer.errors import TrainingError
from trainer.loss import bradley_terry, correct
from trainer.pairs import PairSet
from trainer.training_log import LOG_FILE, TrainingLog

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


@dataclass(frozen=True)
class Job:
    """What the driver hands to every worker; `data` is (train, heldout) in the object store."""

    config: TrainConfig
    contract: ScoringContract
    data: ray.ObjectRef[tuple[PairSet, PairSet]]
    num_steps: int
    card: dict[str, Any]


def train(job: Job) -> dict[str, Any]:
    """Train, evaluate on the held-out pairs, export; the held-out metrics, on every worker."""
    config, output_dir = job.config, Path(job.config.output_dir)
    _prepare_process(config.distributed.cpus_per_worker)
    pairs, heldout = ray.get(job.data)

    engine = zero.initialize(config, job.num_steps)
    run_dir = output_dir / resume.RUN_NAME
    start = resume.restore(engine, run_dir)
    log = TrainingLog(output_dir / LOG_FILE, start) if dist.get_rank() == 0 else None
    for index in range(start, job.num_steps):
        metrics = train_step(engine, config, pairs, index)
        if log is not None:
            log.write(metrics)
        if (index + 1) % config.checkpoint.every_steps == 0 or index + 1 == job.num_steps:
            resume.save(engine, index + 1, metrics, run_dir, config.checkpoint.num_to_keep)
    if log is not None:
        log.close()
    result = finish.evaluate(engine, config, heldout)
    finish.export(engine, config, job.contract, {**job.card, **result})
    return result


def train_step(
    engine: DeepSpeedEngine, config: TrainConfig, pairs: PairSet, index: int
) -> dict[str, Any]:
    """Optimizer step `index` (from 0): the log's line. Raises TrainingError on a non-finite loss.

    The loss is the mean over the pairs of the global batch, however they fall into forward passes.
    """
    began = time.perf_counter()
    training, workers, rank = config.training, dist.get_world_size(), dist.get_rank()
    batch = global_batch(len(pairs), training.global_batch_pairs, training.seed, index)
    passes = micro_batches(batch, pairs.lengths, training.micro_batch_pairs, rank, workers)
    rates = engine.get_lr()
    sums = torch.zeros(4, dtype=torch.float64, device=engine.device)
    highest = torch.full((3,), -math.inf, dtype=torch.float64, device=engine.device)
    for number, mine in enumerate(passes):
        engine.set_gradient_accumulation_boundary(number == len(passes) - 1)
        chosen, rejected = rewards(engine, pairs, mine)
        margins = torch.as_tensor(pairs.margins[mine], device=engine.device)
        losses = bradley_terry(chosen, rejected, margins if training.use_margin else None)
        _check_finite(losses, pairs, mine, index)
        # DeepSpeed averages over the workers, hence the factor.
        engine.backward(losses.sum() * (workers / len(batch)), scale_wrt_gas=False)
        with torch.no_grad():
            both = torch.cat([chosen, rejected]).double()
            values = (losses, correct(chosen, rejected), chosen - rejected, both)
            sums += torch.stack([value.double().sum() for value in values])
            if mine:
                highest[:2] = torch.maximum(highest[:2], torch.stack([both.max(), -both.min()]))
    grad_norm = zero.step(engine)

    highest[2] = _peak_memory_mb(engine.device)
    dist.all_reduce(sums)
    dist.all_reduce(highest, op=dist.ReduceOp.MAX)
    loss, accuracy, reward_margin, reward = (sums / len(batch)).tolist()
    seconds = time.perf_counter() - began
    return {
        "step": index + 1,
        "epoch": index // steps_per_epoch(len(pairs), training.global_batch_pairs),
        "loss": loss,
        "accuracy": accuracy,
        "reward_margin": reward_margin,
        "min_reward": -highest[1].item(),
        "mean_reward": reward / 2,
        "max_reward": highest[0].item(),
        "learning_rate": rates[0],
        "grad_norm": grad_norm,
        "pairs_per_s": len(batch) / seconds,
        "tokens_per_s": pairs.num_tokens(batch.tolist()) / seconds,
        "memory_mb": highest[2].item(),
    }


def rewards(engine: DeepSpeedEngine, pairs: PairSet, mine: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(P,) rewards of the chosen and of the rejected sides, in one forward pass.

    Without pairs a row of one token is computed and left out, with a gradient of zero: ZeRO 3
    gathers the weights on all workers together, so each must take part in every pass.
    """
    rows = [pairs.chosen(i) for i in mine] + [pairs.rejected(i) for i in mine]
    scores = zero.forward(engine, rows or [[0]])[: len(rows)]
    return scores[: len(mine)], scores[len(mine) :]


def _check_finite(losses: Tensor, pairs: PairSet, mine: Sequence[int], index: int) -> None:
    bad = np.flatnonzero(~torch.isfinite(losses.detach()).cpu().numpy())
    if len(bad):
        lines = ", ".join(str(pairs.rows[mine[i]]) for i in bad[:3])
        raise TrainingError(
            f"step {index + 1}, rank {dist.get_rank()}: the loss of {len(bad)} pairs is not finite "
            f"(data.train lines {lines}); try a lower optimizer.learning_rate"
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


def _peak_memory_mb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # Linux counts in KiB
