"""`make demo`, whole: what it promises, what it writes, and that it leaves nothing running."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from isolation import environment_for_a_cluster

if TYPE_CHECKING:
    from nursery import Nursery

pytestmark = pytest.mark.process

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "examples" / "demo.py"


def processes_marked(mark: str) -> list[str]:
    """The command lines of all processes that inherited the mark in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if mark.encode() in (entry / "environ").read_bytes():
                    found.append((entry / "cmdline").read_text().replace("\0", " "))
            except OSError:
                continue
    return found


@pytest.mark.usefixtures("vllm_engine")
@pytest.mark.parametrize("size", ["small", pytest.param("full", marks=pytest.mark.long)])
def test_the_demo_keeps_its_promises_and_cleans_up(
    nursery: Nursery, tmp_path: Path, size: str
) -> None:
    (tmp_path / "rayward").mkdir()  # as in the project's root, and named like the application
    mark = f"demo-{uuid.uuid4()}"
    environment = environment_for_a_cluster()
    environment |= {"RAYWARD_TEST_MARK": mark, "PYTHONPATH": str(ROOT)}
    environment.pop("OMP_NUM_THREADS", None)
    # The long one is what a user runs, Python's start included.
    python = sys.executable if size == "full" else nursery.python
    done = subprocess.run(
        [python, str(DEMO), *(["--small"] if size == "small" else [])],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert done.stdout.splitlines()[-1] == "DEMO OK"
    summary = json.loads((tmp_path / "outputs/demo/summary.json").read_text())
    if size == "full":
        assert summary["num_pairs"] >= 2000
        assert summary["train_steps"] > 50
        assert summary["heldout_accuracy"] >= 0.95
    num_rollouts = 128 if size == "full" else 16
    assert summary["num_rollouts"] == summary["num_scored"] == num_rollouts
    assert summary["max_abs_diff_offline_vs_served"] <= 1e-5
    assert summary["model_version"].startswith("sha256:")
    assert (tmp_path / summary["export_dir"] / "scoring_contract.json").exists()
    steps = ["data", "base", "policy", "train", "evaluate", "serve", "rollout", "score", "check"]
    assert list(summary["seconds"]) == steps
    for step in steps:
        assert f"] {step}" in done.stdout
    deadline = time.monotonic() + 20  # Ray's processes notice within seconds that it has gone
    while (left := processes_marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert left == []


def test_a_service_that_holds_the_port_is_left_alone(tmp_path: Path) -> None:
    kept = tmp_path / "outputs/demo/summary.json"
    kept.parent.mkdir(parents=True)
    kept.write_text("{}")
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", 8765))
        other.listen()
        done = subprocess.run(
            [sys.executable, str(DEMO)], cwd=tmp_path, capture_output=True, text=True, timeout=60
        )
    assert done.returncode == 1
    assert "port 8765 already" in done.stdout
    assert kept.exists()


def test_a_failing_step_is_named(tmp_path: Path) -> None:
    alone = tmp_path / "demo.py"  # without its neighbours the first step has nothing to run
    shutil.copy(DEMO, alone)
    done = subprocess.run(
        [sys.executable, str(alone)], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert "DEMO FAILED in step 'data'" in done.stdout
    assert "DEMO OK" not in done.stdout
