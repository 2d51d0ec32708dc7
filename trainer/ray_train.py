"""Runs the training loop on Ray Train workers and waits for it."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import ray.train

from reward_actor.cluster import capacity, connect, require_resources
from reward_actor.contract import ScoringContract
from trainer import worker
from trainer.checkpoints.manifest import survey
from trainer.checkpoints.storage import StorageError, checkpoint_storage
from trainer.config.train import TrainConfig
from trainer.data.split import Prepared
from trainer.errors import TrainingError
from trainer.evaluation.baselines import baseline_rewards
from trainer.evaluation.metrics import accuracy
from trainer.job import Job, RunFacts
from trainer.ray_internals import RayTrainer, causes, failures, is_lost_worker
from trainer.report import progress
from trainer.report.tracking import Trackers

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def launch(
    config: TrainConfig,
    contract: ScoringContract,
    prepared: Prepared,
    num_steps: int,
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
    # An evaluation beside the training has the resources of one more worker.
    num_beside = int(config.evaluation.asynchronous)
    quiet = contextlib.ExitStack()
    num_places = settings.num_workers + num_beside
    connect(
        num_places * settings.cpus_per_worker + 1,
        num_places if settings.device == "cuda" else 0,
    )
    try:
        gpus = capacity("GPU")
        least = settings.min_workers or settings.num_workers
        enough = gpus >= least
        use_gpu = settings.device == "cuda" or (settings.device == "auto" and enough)
        bundle = {"CPU": settings.cpus_per_worker, **({"GPU": 1.0} if use_gpu else {})}
        require_resources([bundle] * (least + num_beside))
        baselines = _baselines(prepared, config.training.seed, say)
        up_to = "" if settings.min_workers is None else "up to "
        say(
            f"starting {up_to}{settings.num_workers} workers on {'GPU' if use_gpu else 'CPU'}, "
            f"ZeRO {settings.zero_stage}, {config.model.dtype}"
        )
        facts = RunFacts.of(prepared, num_steps)
        job = Job(config, contract, ray.put(prepared), facts, baselines)
        memory = "/dev/shm" if os.path.isdir("/dev/shm") else None  # where no disk is full
        with tempfile.TemporaryDirectory(prefix="rayward-ray-", dir=memory) as ray_dir:
            return _fit(job, bundle, use_gpu, start, is_private, ray_dir, say, quiet)
    finally:
        if not was_connected:
            ray.shutdown()
        quiet.close()


def _baselines(
    prepared: Prepared, seed: int, say: Callable[[str], None]
) -> dict[str, NDArray[np.float32]]:
    try:
        rewards = baseline_rewards(prepared.train, prepared.heldout, seed)
    except Exception as error:  # what a model is compared with must not stop its training
        say(f"warning: no baselines: {type(error).__name__}: {error}")
        return {}
    if rewards:
        found = {name: accuracy(prepared.heldout, of).mean for name, of in rewards.items()}
        shown = ", ".join(f"{name} {value:.4f}" for name, value in found.items())
        say(f"baselines on the held-out pairs: {shown}")
    return rewards


def _fit(
    job: Job,
    bundle: dict[str, float],
    use_gpu: bool,
    start: int,
    is_private: bool,
    ray_dir: str,
    say: Callable[[str], None],
    quiet: contextlib.ExitStack,
) -> dict[str, Any]:
    """quiet: takes what nobody wants to read of an interrupted training."""
    config = job.config
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    least, most = config.distributed.min_workers, config.distributed.num_workers
    # Any: Ray's annotations are those of its older trainer.
    run_config: Any = ray.train.RunConfig
    scaling_config: Any = ray.train.ScalingConfig
    trainer_class: Any = RayTrainer
    trainer = trainer_class(
        worker.run_training_loop,
        train_loop_config=job,
        scaling_config=scaling_config(
            num_workers=(least, most) if least else most,
            use_gpu=use_gpu,
            resources_per_worker=bundle,
        ),
        run_config=run_config(
            name="train",
            # Ray's notes about the run, from which nothing is read: a training ends when Ray cannot
            # write them.
            storage_path=ray_dir,
            failure_config=ray.train.FailureConfig(max_failures=config.distributed.max_failures),
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
        ),
        validation_config=_validation(job, bundle) if config.evaluation.asynchronous else None,
    )
    trainer.is_private = is_private
    trainer.resume = partial(_resume, config, bundle)
    with Trackers(config, say) as trackers, _following(job, start, trackers):
        try:
            result = trainer.fit()
        except KeyboardInterrupt:
            # Workers end one after the other, and tell of those that are gone.
            quiet.enter_context(contextlib.redirect_stdout(io.StringIO()))
            quiet.enter_context(contextlib.redirect_stderr(io.StringIO()))
            trainer.abort()
            raise
        except Exception as error:
            raise _cause(error) from error
    final: dict[str, Any] = result.return_value
    return final


@contextmanager
def _following(job: Job, start: int, trackers: Trackers) -> Iterator[None]:
    """Show, and tell the trackers, what the workers log while this lasts."""
    ended = threading.Event()
    follower = threading.Thread(
        target=progress.show,
        args=(Path(job.config.output_dir), start, job.facts.num_steps, lambda: not ended.is_set()),
        kwargs={"also": trackers.log},
        daemon=True,
    )
    follower.start()
    try:
        yield
    finally:
        ended.set()
        follower.join()


def _validation(job: Job, bundle: dict[str, float]) -> ray.train.ValidationConfig:
    resources = {"num_cpus": bundle["CPU"], "num_gpus": bundle.get("GPU", 0.0)}
    return ray.train.ValidationConfig(
        fn=worker.Validator(job.config, job.data, resources), ray_remote_kwargs={"num_cpus": 0}
    )


def _resume(config: TrainConfig, bundle: dict[str, float]) -> str:
    """What a restart after a lost worker waits for, and from where it resumes. Deletes nothing."""
    needed = " and ".join(f"{amount:g} {name}" for name, amount in bundle.items())
    with contextlib.suppress(*StorageError):
        if states := survey(checkpoint_storage(config)).states:
            return f"waiting for {needed} for each worker, then resuming from step {states[0].step}"
    return f"waiting for {needed} for each worker, then starting again"


def _cause(error: Exception) -> Exception:
    """What our own code raised on a worker; a TrainingError for a lost worker or a storage that
    failed; for what nobody foresaw Ray's error, with its traceback."""
    ours = next(causes(error), None)
    if ours is not None:
        return ours
    for failure in failures(error):
        if is_lost_worker(failure):
            reason = "a worker was lost, and distributed.max_failures allows no more of that"
        elif isinstance(failure, OSError):
            reason = f"{type(failure).__name__}: {failure}"
        else:
            continue
        return TrainingError(f"{reason}. The same command resumes from the last checkpoint")
    return error
