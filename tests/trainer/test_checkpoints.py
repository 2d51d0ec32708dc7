"""Checkpoints of a real engine in a storage that is not what it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from engines import OnWorkers, train_without_ray, trainer
from engines import settings as engine_settings
from trainer_runs import overrides, settings, write_pairs

from trainer.checkpoints.checkpoints import Checkpoints
from trainer.checkpoints.manifest import manifest_name, survey
from trainer.checkpoints.storage import checkpoint_storage
from trainer.config.config_file import load_config
from trainer.data.prepare import prepare
from trainer.network import zero
from trainer.run import resolve_paths


def test_a_restart_that_finds_no_checkpoint_leaves_the_log_alone(
    on_workers: OnWorkers, base_model, tmp_path: Path
):
    """As Ray Train restarts workers behind a storage that was unplugged."""
    data = write_pairs(tmp_path / "pairs.jsonl")
    changes = {"checkpoint__every_steps": 20}
    values = settings(base_model, data, tmp_path / "rm", **changes)
    config = resolve_paths(load_config(None, overrides(values)))
    prepared, contract = prepare(config)
    log = tmp_path / "rm" / "training_log.jsonl"
    log.parent.mkdir()
    lines = "".join(json.dumps({"step": step}) + "\n" for step in range(1, 42))
    log.write_text(lines)
    with pytest.raises(RuntimeError, match=r"has 41 steps, but there is no checkpoint in"):
        on_workers(1, train_without_ray, config, contract, prepared, 60)
    assert log.read_text() == lines


def store_beside_an_unreadable_one(model: Path, output_dir: Path) -> tuple[int, list[int]]:
    """How many checkpoints failed while an old one could not be read, and whose are there."""
    config = engine_settings(model, output_dir=output_dir, checkpoint__num_to_keep=2)
    built = trainer(config)
    checkpoints = Checkpoints(built.engine, config)
    checkpoints.save(1)
    checkpoints.wait()
    (old,) = checkpoints.stored().states
    manifest = Path(checkpoint_storage(config).path(f"{old.folder}/{manifest_name(0)}"))
    manifest.unlink()
    manifest.symlink_to("/proc/self/mem")  # what reads there gets EIO
    with pytest.raises(OSError, match="Input/output error"):
        checkpoints.stored()
    for step in (2, 3, 4):
        checkpoints.save(step)
    checkpoints.wait()
    steps = [state.step for state in checkpoints.stored().states]
    checkpoints.close()
    zero.release(built.engine)
    return checkpoints.num_failed, steps


def test_an_old_checkpoint_that_cannot_be_read_costs_no_new_one(
    on_workers: OnWorkers, base_model, tmp_path: Path
):
    assert on_workers(1, store_beside_an_unreadable_one, base_model, tmp_path) == [(0, [4, 3])]


def prefer_one_that_cannot_be_stored(model: Path, output_dir: Path) -> tuple[int | None, list[int]]:
    """The best step, and whose checkpoints are there, after a better one found no room."""
    config = engine_settings(model, output_dir=output_dir, checkpoint__num_to_keep=2)
    built = trainer(config)
    checkpoints = Checkpoints(built.engine, config)
    checkpoints.prefer(2)
    checkpoints.save(2)
    checkpoints.prefer(4)  # while that of step 2 may be on its way
    checkpoints.wait()
    place = Path(checkpoint_storage(config).root)
    place.rename(place.with_name("unplugged"))
    place.write_text("in the way")
    checkpoints.save(4)
    checkpoints.wait()
    place.unlink()
    place.with_name("unplugged").rename(place)
    for step in (5, 6, 7):
        checkpoints.save(step)
    checkpoints.close()
    zero.release(built.engine)
    assert checkpoints.num_failed == 1
    return checkpoints.best, sorted(
        state.step for state in survey(checkpoint_storage(config)).states
    )


def test_the_best_checkpoint_is_kept_until_a_better_one_is_stored(
    on_workers: OnWorkers, base_model, tmp_path: Path
):
    assert on_workers(1, prefer_one_that_cannot_be_stored, base_model, tmp_path) == [(2, [2, 6, 7])]
