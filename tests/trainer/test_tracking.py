"""Trackers: each metric once under one name, through restarts, and never in the training's way."""

from __future__ import annotations

import importlib.util
import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from log_lines import evaluation_line, step_line
from tracked_runs import config_of, steps

from trainer.config.train import TrainConfig
from trainer.report.progress import Line
from trainer.report.tracking import STATE_FILE, Trackers, check_trackers, metrics_of, settings_of


def trained_twice(config: TrainConfig) -> list[str]:
    """Killed after step 5, restarted from the checkpoint of step 3; what the trackers said."""
    said: list[str] = []
    killed = Trackers(config, said.append)
    killed.log([*steps(1, 4), Line("heldout", evaluation_line(4))])
    killed.log(steps(5, 5))
    with Trackers(config, said.append) as trackers:
        trackers.log([*steps(4, 4), Line("heldout", evaluation_line(4)), *steps(5, 6)])
        trackers.log([*steps(7, 8), Line("heldout", evaluation_line(8))])
    return said


def tensorboard_events(output_dir: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(output_dir / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def test_tensorboard_has_every_step_once_after_a_restart(tmp_path: Path) -> None:
    said = trained_twice(config_of(tmp_path / "polite", ["tensorboard"]))
    assert said == [f"tensorboard: tensorboard --logdir {tmp_path / 'polite' / 'tensorboard'}"] * 2
    events = tensorboard_events(tmp_path / "polite")
    assert [step for step, _ in events["train/loss"]] == list(range(1, 9))
    assert [value for _, value in events["train/loss"]] == pytest.approx(
        [step_line(step)["loss"] for step in range(1, 9)]
    )
    assert [step for step, _ in events["heldout/accuracy"]] == [4, 8]
    assert "heldout/subsets/math/accuracy" in events


def test_what_was_logged_survives_a_kill(tmp_path: Path) -> None:
    trackers = Trackers(config_of(tmp_path / "polite", ["tensorboard"]), lambda _: None)
    trackers.log(steps(1, 3))  # and never closed
    assert [step for step, _ in tensorboard_events(tmp_path / "polite")["train/loss"]] == [1, 2, 3]


def test_mlflow_goes_on_with_its_run_in_a_local_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    config = config_of(tmp_path / "polite", ["mlflow"])
    trained_twice(config)
    assert [path.name for path in tmp_path.iterdir()] == ["polite"]  # nothing beside the run
    with sqlite3.connect(tmp_path / "polite" / "mlflow.db") as store:
        runs = store.execute("select run_uuid, name, status from runs").fetchall()
        metrics = store.execute("select key, step, value from metrics order by step").fetchall()
        params = dict(store.execute("select key, value from params").fetchall())
    (run,) = runs
    assert run == (json.loads((tmp_path / "polite" / STATE_FILE).read_text())["runs"]["mlflow"],
                   "polite", "FINISHED")  # fmt: skip
    losses = [(step, value) for key, step, value in metrics if key == "train/loss"]
    assert losses == [(step, step_line(step)["loss"]) for step in range(1, 9)]
    assert [step for key, step, _ in metrics if key == "heldout/accuracy"] == [4, 8]
    assert params == settings_of(config)


def test_a_tracker_that_is_not_installed_is_told_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "alembic" else found(name)
    )
    config = config_of(tmp_path / "polite", ["tensorboard", "mlflow"])
    with pytest.raises(
        ValueError, match=r'mlflow needs alembic: pip install "rayward\[tracking\]"'
    ):
        check_trackers(config.report)


def test_a_server_that_is_not_there_is_told_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(ValueError, match=r"mlflow cannot use http://127\.0\.0\.1:9"):
        Trackers(config_of(tmp_path / "polite", ["mlflow"]))


def test_a_tracker_that_fails_is_left_out_and_the_others_go_on(tmp_path: Path) -> None:
    said: list[str] = []
    config = config_of(tmp_path / "polite", ["tensorboard"])
    with Trackers(config, said.append) as trackers:

        class Broken:
            run_id, place = None, ""

            def log(self, _metrics: object) -> None:
                raise ConnectionError("the server is gone")

            def close(self, _finished: bool) -> None:
                raise AssertionError("it is not asked again")

        trackers._trackers = {"mlflow": Broken(), **trackers._trackers}
        trackers.log(steps(1, 2))
        trackers.log(steps(3, 3))
    assert said[1:] == [
        "mlflow failed and gets nothing more of this training: ConnectionError: the server is gone"
    ]
    assert len(tensorboard_events(tmp_path / "polite")["train/loss"]) == 3


def test_without_trackers_nothing_is_written(tmp_path: Path) -> None:
    with Trackers(config_of(tmp_path / "polite", [])) as trackers:
        trackers.log(steps(1, 3))
    assert list((tmp_path / "polite").iterdir()) == []


VALUES = st.one_of(st.none(), st.integers(-9, 9), st.floats(), st.text(max_size=3), st.just([1.5]))
NAMES = st.text(max_size=6)


@given(st.dictionaries(NAMES, VALUES | st.dictionaries(NAMES, VALUES, max_size=3), max_size=5))
def test_metrics_are_finite_numbers_under_names_that_every_tracker_takes(
    values: dict[str, Any],
) -> None:
    for name, value in metrics_of(Line("heldout", {"step": 1, **values})).items():
        assert name.startswith("heldout/")
        assert all(c.isascii() and (c.isalnum() or c in "_. -/") for c in name)
        assert value - value == 0
