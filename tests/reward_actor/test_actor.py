"""A scorer as a Ray actor: what its caller learns when it does not start."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from typing import Any

import pytest

from reward_actor import actor


def refuse() -> None:
    try:
        raise OSError("an earlier error")
    except OSError as error:
        raise ValueError("it has two reasons:\n  File: one\nand another: two") from error


def fail() -> None:
    raise AssertionError


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


DIED = (
    "the process that was to load /a/model as a scorer died; most likely it ran out of memory: "
    "free some, or name a service that runs elsewhere"
)


@pytest.mark.parametrize(
    ("load", "message"),
    [
        (refuse, "it has two reasons:\n  File: one\nand another: two"),
        (fail, "AssertionError"),
        (die, DIED),
    ],
)
def test_a_scorer_that_does_not_start_says_why(
    ray_cluster: None, load: Callable[[], None], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    class Loading:
        def __init__(self, path: str) -> None:
            assert path == "/a/model"
            load()

        def info(self) -> None:
            raise NotImplementedError

    remote: Any = ray.remote(Loading)
    monkeypatch.setattr(actor, "RewardScorerActor", remote)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        actor.start_scorer_actor("/a/model")
