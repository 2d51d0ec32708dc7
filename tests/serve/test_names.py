"""What a model is called by the service that is started with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from reward_actor.info import model_name
from reward_actor.model.ensemble import write_ensemble
from serve.app import resolve
from serve.config import ServeConfig


@pytest.mark.parametrize(
    ("folder", "settings", "name"),
    [
        ("run-7/export", None, "run-7"),
        ("run-7/export", {"report": {"run_name": None}}, "run-7"),
        ("run-7/export", {"report": {"run_name": "helpful"}}, "helpful"),
        ("helpful-v2", {"report": []}, "helpful-v2"),
    ],
)
def test_a_models_name_is_its_runs(tmp_path: Path, folder: str, settings: Any, name: str) -> None:
    directory = tmp_path / folder
    directory.mkdir(parents=True)
    if settings is not None:
        (directory / "resolved_config.json").write_text(json.dumps(settings))
    assert model_name(directory) == name
    (tmp_path / "latest").symlink_to(directory)
    assert model_name(tmp_path / "latest") == name


def test_a_service_calls_its_model_as_it_is_told_or_as_its_registry_does(
    seeds: list[Path], tmp_path: Path
) -> None:
    def name(model: Path, **settings: Any) -> str:
        return resolve(ServeConfig(model=str(model), **settings)).name

    assert name(seeds[0]) == "seed-0"
    write_ensemble(tmp_path / "both" / "export", seeds)
    assert name(tmp_path / "both" / "export") == "both"
    listed = shutil.copytree(seeds[0], tmp_path / "registry" / "first" / "export")
    (listed / "resolved_config.json").write_text('{"report": {"run_name": "seed-0"}}')
    registry = str(tmp_path / "registry")
    assert name(listed, registry=registry) == "first"
    assert name(seeds[0], registry=registry) == "seed-0"
    assert name(listed, registry=registry, name="mine") == "mine"
