"""Trainings that go on with another number of workers, by real engines under each stage of ZeRO."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
from disks import fill
from engines import OnWorkers, settings, trainer
from trainer_runs import log_of, overrides, write_pairs
from trainer_runs import settings as run_settings

from trainer.checkpoints.checkpoints import Checkpoints
from trainer.checkpoints.manifest import survey
from trainer.checkpoints.storage import Storage
from trainer.config.config_file import load_config
from trainer.network import zero
from trainer.run import train

DONE, STEPS = 3, 6


def first(model: Path, output_dir: Path, changes: dict[str, Any]) -> list[float]:
    """The losses of the steps after the checkpoint."""
    config = settings(model, output_dir=output_dir, **changes)
    built = trainer(config)
    checkpoints = Checkpoints(built.engine, config)
    for i in range(DONE):
        built.step(i)
    checkpoints.save(DONE)
    losses = [built.step(i)["loss"] for i in range(DONE, STEPS)]
    checkpoints.close()
    zero.release(built.engine)
    return losses


def second(model: Path, output_dir: Path, changes: dict[str, Any]) -> list[float]:
    """The same by those that load it; and they can store and load what they have made of it."""
    config = settings(model, output_dir=output_dir, **changes)
    built = trainer(config)
    checkpoints = Checkpoints(built.engine, config)
    try:
        assert checkpoints.restore() == DONE
        losses = [built.step(DONE)["loss"]]
        checkpoints.save(DONE + 1)
        built.step(DONE + 1)
        assert checkpoints.restore() == DONE + 1
        losses += [built.step(i)["loss"] for i in range(DONE + 1, STEPS)]
    finally:
        checkpoints.close()
        zero.release(built.engine)
    return losses


@pytest.mark.parametrize(
    ("before", "after", "changes"),
    [
        (2, 1, {"distributed__zero_stage": 0}),
        pytest.param(2, 1, {"distributed__zero_stage": 1}, marks=pytest.mark.long),
        (2, 1, {"distributed__zero_stage": 2}),
        (1, 2, {"distributed__zero_stage": 2}),
        (2, 1, {"distributed__zero_stage": 3}),
        pytest.param(1, 2, {"distributed__zero_stage": 3}, marks=pytest.mark.long),
        (2, 1, {"distributed__zero_stage": 2, "adapter__rank": 4}),
        pytest.param(
            2, 1, {"distributed__zero_stage": 3, "adapter__rank": 4}, marks=pytest.mark.long
        ),
    ],
)
def test_another_number_of_workers_goes_on_alike(
    on_workers: OnWorkers,
    base_model: Path,
    tmp_path: Path,
    before: int,
    after: int,
    changes: dict[str, Any],
) -> None:
    expected = on_workers(before, first, base_model, tmp_path, changes)[0]
    assert on_workers(after, second, base_model, tmp_path, changes)[0] == pytest.approx(
        expected, abs=1e-5
    )


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_in_bfloat16_but_for_rounding(
    on_workers: OnWorkers, base_model: Path, tmp_path: Path, stage: int
) -> None:
    changes = {"distributed__zero_stage": stage, "model__dtype": "bfloat16"}
    expected = on_workers(2, first, base_model, tmp_path, changes)[0]
    assert on_workers(1, second, base_model, tmp_path, changes)[0] == pytest.approx(
        expected, abs=0.02
    )


def test_an_optimizer_whose_state_is_not_known_is_refused(
    on_workers: OnWorkers, base_model: Path, tmp_path: Path
) -> None:
    changes = {"optimizer__name": "muon", "optimizer__max_grad_norm": 0}
    on_workers(2, first, base_model, tmp_path, changes)
    with pytest.raises(RuntimeError, match=r"of 2 workers, and 1 cannot go on from it: .* muon"):
        on_workers(1, second, base_model, tmp_path, changes)


def convert_without_room(model: Path, output_dir: Path, disk: Path) -> str:
    """What a worker says of a conversion for which its node has no room: the first one makes it."""
    config = settings(model, output_dir=output_dir)
    tempfile.tempdir = str(disk)
    built = trainer(config)
    checkpoints = Checkpoints(built.engine, config)
    fill(disk)
    try:
        checkpoints.restore()
    except OSError as error:
        return str(error)
    finally:
        checkpoints.close()
        zero.release(built.engine)
        tempfile.tempdir = None
    return ""


def test_every_worker_hears_that_one_cannot_cut_it_up(
    on_workers: OnWorkers, base_model: Path, tmp_path: Path, small_disk: Path
) -> None:
    on_workers(1, first, base_model, tmp_path, {})
    told = on_workers(2, convert_without_room, base_model, tmp_path, small_disk)
    assert told[0] == told[1]
    assert "rank 0: cannot be cut up anew: " in told[0]


@pytest.mark.long
def test_a_cluster_with_room_for_fewer_workers_trains_with_those(
    ray_cluster, base_model: Path, tmp_path: Path
) -> None:
    """16 logical CPUs have room for two of six each; the losses are those of one worker."""
    data = write_pairs(tmp_path / "pairs.jsonl")
    changes = {"training__max_steps": 6}
    some = {
        "distributed__num_workers": 4,
        "distributed__min_workers": 1,
        "distributed__cpus_per_worker": 6,
    }
    for name, more in (("some", some), ("one", {"distributed__num_workers": 1})):
        values = run_settings(base_model, data, tmp_path / name, **changes, **more)
        train(load_config(None, overrides(values)), say=lambda _: None)
    ours, expected = ([line["loss"] for line in log_of(tmp_path / n)] for n in ("some", "one"))
    assert ours == pytest.approx(expected, abs=1e-4)
    (state,) = survey(Storage.at(str(tmp_path / "some"), "checkpoints")).states
    assert state.num_workers == 2
