"""Every private name of Ray Train that the trainer uses, as of Ray 2.60.

tests/trainer/test_ray_internals.py fails when a new version has moved one.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import ray
import ray.exceptions
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.exceptions import (
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)
from ray.train.v2._internal.execution.failure_handling import (
    DefaultFailurePolicy,
    FailureDecision,
)

from reward_actor.terminal import say
from trainer.errors import TrainingError

_ABORT_S = 10
_NODE = re.compile(r"^\s*(?:node_)?ip: (\S+)", re.MULTILINE)


class OnlyLostWorkers(DefaultFailurePolicy):
    """Restarts after a worker was lost; what our own code has raised would be raised again. Ray's
    public `FailureConfig` only counts.

    `resume` says what a restart waits for and from where it resumes. It runs in Ray's controller,
    whose standard output the driver prints.
    """

    def __init__(self, failure_config: Any, resume: Callable[[], str]) -> None:
        super().__init__(failure_config)
        self._resume = resume

    def make_decision(self, training_failed_error: Any) -> FailureDecision:
        if any(causes(training_failed_error)):
            return FailureDecision.RAISE
        decision = super().make_decision(training_failed_error)
        if decision == FailureDecision.RETRY:
            say(f"{lost(training_failed_error)}; {self._resume()}")
        return decision


class RayTrainer(TorchTrainer):
    """Ray's trainer with its own idea of failures, and with Ctrl-C left to Python, which ends `fit`
    with KeyboardInterrupt at once.

    Ray's own handler waits for the workers and exits with status 0. `fit` must run on the main
    thread: a thread that still waits for Ray when it is shut down makes Ray end the process.
    """

    is_private = False
    resume: Callable[[], str]
    _controller: Any = None

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        run_config: Any = self.run_config
        arguments["failure_policy"] = OnlyLostWorkers(run_config.failure_config, self.resume)
        return super()._initialize_and_run_controller(**arguments)  # type: ignore[misc]

    def _register_sigint_handler(self, controller: Any) -> None:
        self._controller = controller

    def abort(self) -> None:
        """End the workers of an interrupted `fit`; after `_ABORT_S`, without their consent."""
        if self._controller is None:
            return
        # RayError: the controller has ended, as asked, or does not answer.
        with contextlib.suppress(ray.exceptions.RayError):
            ray.get(self._controller.abort.remote(), timeout=_ABORT_S)
        ray.kill(self._controller)

    def _create_default_callbacks(self) -> list[Any]:
        callbacks: list[Any] = super()._create_default_callbacks()  # type: ignore[misc]
        if not self.is_private:
            return callbacks
        # The actor that cleans up behind a dead controller asks Ray's dashboard, which a private
        # cluster does not start, and complains every second. There is nothing to clean up.
        return [c for c in callbacks if type(c).__name__ != "PlacementGroupCleanerCallback"]


def causes(error: Exception) -> Iterator[Exception]:
    """What our own code raised on the workers."""
    return (one for one in failures(error) if isinstance(one, ValueError | TrainingError))


def failures(error: Exception) -> Iterator[Exception]:
    """What the workers raised, and what that came from; Ray wraps an error of theirs."""
    for failure in getattr(error, "worker_failures", {}).values():
        while failure is not None:
            yield failure
            failure = getattr(failure, "_base_exc", None) or failure.__cause__


def lost(error: Exception) -> str:
    """Which workers are gone, as far as Ray's error says so, or what else went wrong."""
    failed = getattr(error, "worker_failures", {})
    nodes = {
        rank: _NODE.search(str(failure))
        for rank, failure in failed.items()
        if is_lost_worker(failure)
    }
    if not nodes:
        first = next(failures(error), error)
        kind = "a worker failed" if failed else "the workers could not be started"
        return f"{kind} ({type(first).__name__}: {(str(first).splitlines() or [''])[0]})"
    shown = (f"{rank} on node {of[1]}" if of else str(rank) for rank, of in sorted(nodes.items()))
    return f"worker lost: {', '.join(shown)}"


def is_lost_worker(failure: Exception) -> bool:
    return isinstance(failure, WorkerHealthCheckFailedError | WorkerHealthCheckTimeoutError)
