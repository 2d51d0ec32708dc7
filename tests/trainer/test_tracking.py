"""Trackers: each metric once under one name, through restarts, and never in the training's way."""

from __future__ import annotations

import importlib.util
import json
import sqlite3
import struct
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from log_lines import evaluation_line, step_line

from trainer.config.config_file import load_config
from trainer.config.train import TrainConfig
from trainer.report.progress import Line
from trainer.report.tracking import STATE_FILE, Trackers, check_trackers, metrics_of, settings_of


def config_of(output_dir: Path, trackers: Sequence[str]) -> TrainConfig:
    output_dir.mkdir(exist_ok=True)
    return load_config(
        None,
        [
            ("data.train", "pairs.jsonl"),
            ("output_dir", str(output_dir)),
            ("report.trackers", json.dumps(trackers)),
            ("report.project", "tests"),
        ],
    )


def steps(first: int, last: int) -> list[Line]:
    return [Line("train", step_line(step)) for step in range(first, last + 1)]


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


def wandb_records(run_file: Path) -> Iterator[Any]:
    """What a run file of Weights & Biases holds, which is what `wandb sync` reads.

    After 7 bytes it is LevelDB's log: blocks of 32 KiB, in them pieces of records, each after 4
    bytes of checksum, 2 of size, 1 of type (1 whole, 2 first, 3 middle, 4 last).
    """
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, record = run_file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768  # the rest of a block is too small for another piece
            continue
        size, kind = struct.unpack_from("<HB", data, at + 4)
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):
            yield Record.FromString(record)
            record = b""


def wandb_history(run_file: Path) -> list[dict[str, Any]]:
    """The logged values, once the writer, another process, has written the last of them."""
    deadline = time.monotonic() + 20
    while True:
        records = list(wandb_records(run_file))
        if any(record.WhichOneof("record_type") == "exit" for record in records):
            break
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return [
        {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]


def test_wandb_goes_on_with_its_run_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = config_of(tmp_path / "polite", ["wandb"])
    check_trackers(config.report)
    said: list[str] = []
    for first, last in ((1, 4), (3, 8)):
        with Trackers(config, said.append) as trackers:
            trackers.log([*steps(first, last), Line("heldout", evaluation_line(last))])
    run_id = json.loads((tmp_path / "polite" / STATE_FILE).read_text())["runs"]["wandb"]
    files = sorted((tmp_path / "polite" / "wandb").glob(f"offline-run-*/run-{run_id}.wandb"))
    assert [line.rpartition(" ")[2] for line in said] == [str(file.parent) for file in files]
    assert said[0].startswith("wandb: wandb sync ")
    rows = [row for file in files for row in wandb_history(file)]
    losses = {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}
    assert losses == {step: step_line(step)["loss"] for step in range(1, 9)}
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 4, 5, 6, 7, 8, 8]


def test_wandb_without_a_key_is_told_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    wandb.teardown()
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    config = config_of(tmp_path / "polite", ["wandb"])
    with pytest.raises(ValueError, match=r"no API key.*WANDB_API_KEY.*WANDB_MODE=offline"):
        check_trackers(config.report)
    wandb.teardown()


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
