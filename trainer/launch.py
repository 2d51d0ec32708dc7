"""Runs the training loop on Ray Train workers and waits for it."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train.torch import TorchTrainer
from ray.train.v2.api.config import LoggingConfig

from reward_actor.cluster import capacity, connect, require_resources
from reward_actor.contract import ScoringContract
from trainer import loop, progress, resume
from trainer.config import TrainConfig
from trainer.errors import TrainingError
from trainer.pairs import Prepared
from trainer.training_log import LOG_FILE


def launch(
    config: TrainConfig,
    contract: ScoringContract,
    prepared: Prepared,
    facts: dict[str, Any],
    start: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Train on a cluster, joined or started for it, and export; the worker's result.

    Raises ValueError if the cluster is too small, TrainingError if the training fails.
    """
    settings = config.distributed
    was_connected = ray.is_initialized()
    is_private = not os.environ.get("RAY_ADDRESS")
    # Ray forwards every print of a worker, DeepSpeed's included; this leaves them redirectable.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    # How late Ray Train notices that a worker has reported, failed or finished; 2 by default.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    if is_private:  # no node of a cluster that ends with this process is taken away before
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    connect(
        settings.num_workers * settings.cpus_per_worker + 1,
        settings.num_workers if settings.device == "cuda" else 0,
    )
    try:
        gpus = capacity("GPU")
        use_gpu = settings.device == "cuda" or (
            settings.device == "auto" and gpus >= settings.num_workers
        )
        bundle = {"CPU": settings.cpus_per_worker, **({"GPU": 1.0} if use_gpu else {})}
        require_resources([bundle] * settings.num_workers)
        say(
            f"starting {settings.num_workers} workers on {'GPU' if use_gpu else 'CPU'}, "
            f"ZeRO {settings.zero_stage}, {config.model.dtype}"
        )
        data = ray.put((prepared.train, prepared.heldout))
        job = loop.Job(config, contract, data, int(facts["num_steps"]), facts)
        return _fit(job, bundle, use_gpu, start, is_private)
    finally:
        if not was_connected:
            ray.shutdown()


def _fit(
    job: loop.Job, bundle: dict[str, float], use_gpu: bool, start: int, is_private: bool
) -> dict[str, Any]:
    config = job.config
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    # Any: Ray's annotations are those of its older trainer.
    trainer_class: Any = _PrivateTrainer if is_private else TorchTrainer
    run_config: Any = ray.train.RunConfig
    trainer = trainer_class(
        loop.train,
        train_loop_config=job,
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.distributed.num_workers, use_gpu=use_gpu, resources_per_worker=bundle
        ),
        run_config=run_config(
            name=resume.RUN_NAME,
            storage_path=config.output_dir,
            failure_config=ray.train.FailureConfig(max_failures=config.distributed.max_failures),
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )
    outcome: list[Any] = []

    def fit() -> None:
        try:
            outcome.append(trainer.fit())
        except Exception as error:  # raised again below, on the main thread
            outcome.append(error)

    # Not on the main thread: there Ray Train takes over Ctrl-C and waits for the workers.
    thread = threading.Thread(target=fit, daemon=True)
    thread.start()
    progress.show(Path(config.output_dir) / LOG_FILE, start, job.num_steps, thread.is_alive)
    (result,) = outcome
    if isinstance(result, Exception):
        raise _cause(result)
    final: dict[str, Any] = result.return_value
    return final


class _PrivateTrainer(TorchTrainer):
    """Without the actor that cleans up behind a dead controller: it asks Ray's dashboard, which a
    private cluster does not start, and complains every second. There is nothing to clean up."""

    def _create_default_callbacks(self) -> list[Any]:
        callbacks: list[Any] = super()._create_default_callbacks()  # type: ignore[misc]
        return [c for c in callbacks if type(c).__name__ != "PlacementGroupCleanerCallback"]


def _cause(error: Exception) -> Exception:
    """What our own code raised on a worker, or Ray's error if it was something else."""
    for failure in getattr(error, "worker_failures", {}).values():
        while failure is not None:
            if isinstance(failure, ValueError | TrainingError):
                return failure
            failure = getattr(failure, "_base_exc", None) or failure.__cause__
    return error
