"""Checkpoints of real DeepSpeed workers that are killed while they write, or have no room left."""

from __future__ import annotations

import contextlib
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from exports import CORPUS
from isolation import free_port
from trainer_victims import Victims

from reward_actor.contract import sha256_file
from trainer.checkpoints.manifest import survey
from trainer.checkpoints.storage import Storage
from trainer.init_model import init_model

pytestmark = pytest.mark.process


def weights_of(directory: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = torch.load(directory / "weights.pt")
    return weights


@pytest.fixture
def bucket(monkeypatch) -> Iterator[str]:
    """A bucket of an S3 server on this machine, as a URI."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "something")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-p", str(port)], stderr=subprocess.DEVNULL
    )
    where = f"endpoint_override=http://127.0.0.1:{port}&region=us-east-1"
    try:
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            assert time.monotonic() < deadline
            time.sleep(0.1)
        Storage.at(f"s3://bucket/?{where}&allow_bucket_creation=true").make()
        yield f"s3://bucket/runs?{where}"
    finally:
        server.kill()
        server.wait()


def test_killed_while_a_checkpoint_goes_to_s3(nursery, base_model, tmp_path: Path, bucket: str):
    kill_and_go_on(nursery.python, base_model, tmp_path, 2, {"checkpoint__storage_path": bucket})


@pytest.mark.long
def test_killed_twenty_times_while_a_checkpoint_is_written(nursery, tmp_path: Path):
    """Of a network that is large enough for that to take a while."""
    model = init_model(
        tmp_path / "base",
        CORPUS,
        vocab_size=400,
        hidden_size=512,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        intermediate_size=1024,
    )
    changes = {"distributed__zero_stage": "3"}
    assert kill_and_go_on(nursery.python, model, tmp_path, 20, changes) >= 5


@pytest.mark.long
def test_killed_twenty_times_while_a_checkpoint_goes_to_s3(
    nursery, base_model, tmp_path: Path, bucket: str
):
    changes = {"checkpoint__storage_path": bucket}
    assert kill_and_go_on(nursery.python, base_model, tmp_path, 20, changes) >= 5


def kill_and_go_on(
    python: str, model: Path, tmp_path: Path, num_kills: int, changes: dict[str, str]
) -> int:
    """Kill a training so often while it stores a checkpoint; each time the newest complete one goes
    on, and the end is that of a training left alone. How many were left half-written."""
    rng = random.Random(num_kills)

    def victims_in(name: str, last: int = 10_000) -> Victims:
        return Victims(python, model, tmp_path / name, changes, last)

    place = changes.get("checkpoint__storage_path")
    storage = Storage.at(*([place, "killed"] if place else [str(tmp_path / "killed/checkpoints")]))
    waiting = victims_in("killed")  # they import while those before them train
    newest, num_unfinished = 0, 0
    for kill in range(num_kills):
        victims = waiting
        if kill < num_kills - 1:
            waiting = victims_in("killed")
        victims.go()
        assert victims.heard()["step"] == newest, "it goes on from the newest complete one"
        while victims.heard()["step"] < newest + 2:  # one was stored, the next is on its way
            pass
        there = set(storage.folders())
        deadline = time.monotonic() + 60
        while set(storage.folders()) <= there:  # until another one is begun
            assert time.monotonic() < deadline
        time.sleep(rng.random() * 0.05)
        victims.kill()
        found = survey(storage)
        assert found.states[0].step > newest
        assert not found.damaged
        newest = found.states[0].step
        num_unfinished += len(found.unfinished)
    print(f"{num_kills} kills left {num_unfinished} checkpoints half-written")
    last = newest + 2
    final = [victims_in(name, last) for name in ("killed", "alone")]
    for victims in final:
        victims.go()
        victims.finish()
    ours, expected = weights_of(tmp_path / "killed"), weights_of(tmp_path / "alone")
    assert ours.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(ours[name], weight), name
    return num_unfinished


@pytest.mark.parametrize("asynchronous", [pytest.param(False, marks=pytest.mark.long), True])
def test_a_full_disk_costs_a_checkpoint_and_nothing_else(
    nursery, base_model, tmp_path, small_disk: Path, asynchronous: bool
):
    changes = {"checkpoint__storage_path": small_disk, "checkpoint__asynchronous": asynchronous}
    told = {key: str(value) for key, value in changes.items()}
    victims = Victims(nursery.python, base_model, tmp_path / "run", told, last=5, paced=True)
    storage = Storage.at(str(small_disk), "run")

    def step() -> dict[str, int]:
        victims.go()
        return victims.heard()

    victims.go()
    assert victims.heard() == {"step": 0, "num_failed": 0}
    assert [step(), step()][-1] == {"step": 2, "num_failed": 0}
    before = {name: sha256_file(Path(storage.path(name))) for name in storage.sizes()}
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(shutil.disk_usage(small_disk).free - 100_000))
    assert step() == {"step": 3, "num_failed": 1}
    assert step() == {"step": 4, "num_failed": 2}
    assert [state.step for state in survey(storage).states] == [2, 1]
    assert {n: sha256_file(Path(storage.path(n))) for n in storage.sizes()} == before
    ballast.unlink()
    assert step() == {"step": 5, "num_failed": 2}
    victims.finish()
    states = survey(storage).states
    assert [(state.step, state.num_failed) for state in states] == [(5, 2), (2, 0)]
    printed = (tmp_path / "run.0.log").read_text()
    assert "warning: the checkpoint of step 3 could not be stored in" in printed
    assert "No space left on device" in printed
    again = Victims(nursery.python, base_model, tmp_path / "run", told, last=5)
    again.go()
    assert again.finish() == [{"step": 5, "num_failed": 2}]
