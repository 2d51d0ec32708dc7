"""Checkpoints of real DeepSpeed workers that are killed while they write, or have no room left."""

from __future__ import annotations

import os
import random
import shutil
import time
from pathlib import Path

import pytest
import torch
from trainer_victims import Victims

from reward_actor.contract import sha256_file
from trainer.saved import saved_states, survey
from trainer.storage import Storage


def weights_of(directory: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = torch.load(directory / "weights.pt")
    return weights


@pytest.mark.parametrize(
    ("num_kills", "zero_stage", "is_remote"),
    [
        pytest.param(3, 2, True, id="3"),
        pytest.param(20, 3, False, id="20", marks=pytest.mark.long),
    ],
)
def test_killed_while_a_checkpoint_is_written_the_newest_complete_one_goes_on(
    base_model, tmp_path: Path, num_kills: int, zero_stage: int, is_remote: bool
):
    rng = random.Random(num_kills)
    changes = {"distributed__zero_stage": zero_stage}
    storage = Storage.at(str(tmp_path / "killed" / "checkpoints"))

    def victims_in(name: str, last: int = 10_000) -> Victims:
        return Victims(base_model, tmp_path / name, changes, last, is_remote=is_remote)

    waiting = victims_in("killed")
    newest, seen_half_written = 0, 0
    for _ in range(num_kills):
        victims, waiting = waiting, victims_in("killed")
        victims.go()
        assert victims.heard()["step"] == newest, "it goes on from the newest complete one"
        while victims.heard()["step"] < newest + 2:  # one was stored, the next is on its way
            pass
        there = set(os.listdir(storage.root))
        deadline = time.monotonic() + 60
        while set(os.listdir(storage.root)) <= there:  # until another one is begun
            assert time.monotonic() < deadline
        time.sleep(rng.random() * 0.02)
        victims.kill()
        found = survey(storage)
        assert found.states[0].step > newest
        assert not found.damaged
        newest = found.states[0].step
        seen_half_written += len(found.unfinished)
    waiting.kill()
    print(f"{num_kills} kills left {seen_half_written} checkpoints half-written")
    assert seen_half_written or num_kills < 20
    last = newest + 2
    final = [victims_in(name, last) for name in ("killed", "alone")]
    for victims in final:
        victims.go()
        victims.finish()
    ours, expected = weights_of(tmp_path / "killed"), weights_of(tmp_path / "alone")
    assert ours.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(ours[name], weight), name


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_costs_a_checkpoint_and_nothing_else(
    base_model, tmp_path, small_disk: Path, asynchronous: bool
):
    changes = {"checkpoint__storage_path": small_disk, "checkpoint__asynchronous": asynchronous}
    told = {key: str(value) for key, value in changes.items()}
    victims = Victims(base_model, tmp_path / "run", told, last=5, paced=True)
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
    assert [state.step for state in saved_states(storage)] == [2, 1]
    assert {n: sha256_file(Path(storage.path(n))) for n in storage.sizes()} == before
    ballast.unlink()
    assert step() == {"step": 5, "num_failed": 2}
    victims.finish()
    states = saved_states(storage)
    assert [(state.step, state.num_failed) for state in states] == [(5, 2), (2, 0)]
    printed = (tmp_path / "run.0.log").read_text()
    assert "warning: the checkpoint of step 3 could not be stored in" in printed
    assert "No space left on device" in printed
    again = Victims(base_model, tmp_path / "run", told, last=5)
    again.go()
    assert again.finish() == [{"step": 5, "num_failed": 2}]
