"""Weights & Biases, whose writer is a process of its own: its run goes on, its key is asked for."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from log_lines import evaluation_line, step_line
from tracked_runs import config_of, steps

from trainer.report.progress import Line
from trainer.report.tracking import STATE_FILE, Trackers, check_trackers

pytestmark = pytest.mark.process


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
