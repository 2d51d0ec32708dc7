"""What is refused before a training starts: the directory of another one, paths that are none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from trainer_runs import overrides, settings, write_pairs

from trainer.checkpoints.run_directory import locked
from trainer.config.config_file import load_config
from trainer.config.train import TrainConfig
from trainer.run import resolve_paths, train


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl")


def config_for(base_model: Path, data: Path, output_dir: Path, **changes: Any) -> TrainConfig:
    return load_config(None, overrides(settings(base_model, data, output_dir, **changes)))


@pytest.fixture(scope="module")
def begun(base_model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that has claimed it, and was then stopped by one that held it."""
    output_dir = tmp_path_factory.mktemp("begun") / "rm"
    output_dir.mkdir()
    with locked(output_dir), pytest.raises(ValueError, match="in use by another training"):
        train(config_for(base_model, data, output_dir), say=lambda _: None)
    return output_dir


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("optimizer.learning_rate", "0.02", "optimizer.learning_rate was 0.01, is now 0.02"),
        ("distributed.zero_stage", "1", "distributed.zero_stage was 2, is now 1"),
        ("data.max_pairs", "30", "the training pairs differ"),
    ],
)
def test_another_run_in_the_same_directory_is_refused(
    begun, base_model, data, key: str, value: str, message: str
):
    other = config_for(base_model, data, begun, **{key.replace(".", "__"): value})
    with pytest.raises(ValueError, match="holds another run") as error:
        train(other, say=lambda _: None)
    assert message in str(error.value)


def test_a_second_training_in_the_same_directory_is_refused(base_model, data, tmp_path: Path):
    with locked(tmp_path), pytest.raises(ValueError, match="in use by another training"):
        train(config_for(base_model, data, tmp_path), say=lambda _: None)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("data.train", "nowhere.jsonl", r"data.train: .*nowhere.jsonl does not exist"),
        ("data.eval", "nowhere.jsonl", r"data.eval: .*nowhere.jsonl does not exist"),
        ("model.path", "/nowhere", "model.path: /nowhere is not a directory with a model"),
        ("output_dir", "/dev/null/x", "output_dir: /dev/null/x cannot be written"),
    ],
)
def test_bad_paths_are_told_before_anything_starts(
    base_model, data, tmp_path, key: str, value: str, message: str
):
    values = settings(base_model, data, tmp_path / "out") | {key: value}
    with pytest.raises(ValueError, match=message):
        resolve_paths(load_config(None, overrides(values)))


def test_a_relative_output_is_refused_inside_a_ray_job(base_model, data, tmp_path, monkeypatch):
    job = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_0123"
    job.mkdir(parents=True)
    monkeypatch.chdir(job)
    config = load_config(None, overrides(settings(base_model, data, Path("outputs"))))
    with pytest.raises(ValueError, match="a Ray job's working directory is deleted"):
        resolve_paths(config)
