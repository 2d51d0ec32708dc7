"""The private names of Ray Train that are used are where they were.

What they do on a cluster is tested where it is used: test_survival.py and
test_resume.py.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

import ray.train
from ray.core.generated.common_pb2 import ActorDiedErrorContext
from ray.exceptions import ActorDiedError, RayActorError
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.exceptions import (
    UserExceptionWithTraceback,
    WorkerHealthCheckFailedError,
)
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2.api.exceptions import WorkerGroupError

from trainer.errors import TrainingError
from trainer.ray_internals import (
    OnlyLostWorkers,
    RayTrainer,
    causes,
    failures,
    is_lost_worker,
    lost,
)

if TYPE_CHECKING:
    import pytest

OURS = TrainingError("the loss of step 3 is not finite")
LOST = WorkerHealthCheckFailedError("died", RayActorError())


def raised(error: Exception) -> UserExceptionWithTraceback:
    return UserExceptionWithTraceback(error, "a traceback")


def test_only_a_lost_worker_is_replaced_and_a_line_says_so(
    capsys: pytest.CaptureFixture[str],
) -> None:
    policy = OnlyLostWorkers(ray.train.FailureConfig(max_failures=1), lambda: "waiting")
    ours = WorkerGroupError("failed", {0: raised(OURS), 1: LOST})
    assert policy.make_decision(ours) == FailureDecision.RAISE
    gone = WorkerGroupError("failed", {1: LOST})
    assert policy.make_decision(gone) == FailureDecision.RETRY
    assert policy.make_decision(gone) == FailureDecision.RAISE, "one too many"
    assert capsys.readouterr().out == "worker lost: 1; waiting\n"


def test_the_node_of_a_lost_worker_is_named() -> None:
    death = ActorDiedErrorContext(actor_id=bytes(16), node_ip_address="10.0.0.7")
    died = ActorDiedError(death)
    error = WorkerGroupError("failed", {0: LOST, 1: WorkerHealthCheckFailedError("died", died)})
    assert lost(error) == "worker lost: 0, 1 on node 10.0.0.7"


def test_what_a_worker_raised_is_found_in_what_ray_wraps_it_in() -> None:
    error = WorkerGroupError("failed", {0: raised(OURS), 1: LOST})
    assert OURS in failures(error)
    assert list(causes(error)) == [OURS]
    assert [one for one in failures(error) if is_lost_worker(one)] == [LOST]


def test_the_hooks_of_the_trainer_are_there_and_are_called() -> None:
    fit = inspect.getsource(TorchTrainer.fit)
    run = inspect.getsource(TorchTrainer._initialize_and_run_controller)
    assert "_initialize_and_run_controller(" in fit
    assert "failure_policy=" in fit
    assert "failure_policy" in inspect.signature(TrainController.__init__).parameters
    assert "_create_default_callbacks()" in fit
    assert "_register_sigint_handler(controller)" in run
    assert "abort" in dir(TrainController)


def test_a_private_cluster_has_all_callbacks_but_the_cleaner() -> None:
    trainer = RayTrainer(lambda: None)
    names = [type(one).__name__ for one in trainer._create_default_callbacks()]
    trainer.is_private = True
    kept = [type(one).__name__ for one in trainer._create_default_callbacks()]
    assert [name for name in names if name not in kept] == ["PlacementGroupCleanerCallback"]
    assert kept
