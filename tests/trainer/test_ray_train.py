"""What is told of a training that Ray gave up, by the errors that Ray raises."""

from __future__ import annotations

import pytest
from ray.exceptions import RayActorError
from ray.train.v2._internal.exceptions import (
    UserExceptionWithTraceback,
    WorkerHealthCheckFailedError,
)
from ray.train.v2.api.exceptions import WorkerGroupError

from trainer.errors import TrainingError
from trainer.ray_train import _cause

OURS = TrainingError("the loss of step 3 is not finite")
FULL = OSError(28, "No space left on device")
LOST = WorkerHealthCheckFailedError("died", RayActorError())


def raised(error: Exception) -> UserExceptionWithTraceback:
    return UserExceptionWithTraceback(error, "a traceback")


@pytest.mark.parametrize(
    ("failures", "told"),
    [
        ({0: raised(RuntimeError("gloo")), 1: raised(OURS)}, "the loss of step 3 is not finite"),
        ({0: raised(OURS), 1: LOST}, "the loss of step 3 is not finite"),
        ({0: raised(RuntimeError("gloo")), 1: LOST}, "a worker was lost, and distributed.max_fail"),
        ({1: raised(FULL)}, "OSError: [Errno 28] No space left on device. The same command"),
    ],
)
def test_the_cause_is_told_in_one_line(failures: dict[int, Exception], told: str) -> None:
    cause = _cause(WorkerGroupError("failed", failures))
    assert isinstance(cause, TrainingError)
    assert str(cause).startswith(told)


def test_what_nobody_foresaw_keeps_its_traceback() -> None:
    error = WorkerGroupError("failed", {0: raised(KeyError("a bug"))})
    assert _cause(error) is error
