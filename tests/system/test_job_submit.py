"""`ray job submit -- python -m trainer` against a real head node of its own."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
from isolation import free_port
from processes import descendants

if TYPE_CHECKING:
    from nursery import Nursery

pytestmark = pytest.mark.process

ROOT = Path(__file__).resolve().parents[2]
RAY = str(Path(sys.executable).parent / "ray")


@pytest.fixture(scope="module")
def jobs_address(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a head node's job server; its processes end with the module."""
    dashboard, log = free_port(), tmp_path_factory.mktemp("head") / "log"
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "PATH": f"{nursery.bin}{os.pathsep}{os.environ['PATH']}",
    }
    command = [
        nursery.python,
        RAY,
        "start",
        "--head",
        "--block",
        "--num-cpus",
        "8",
        "--disable-usage-stats",
    ]
    command += ["--port", str(free_port()), "--dashboard-host", "127.0.0.1"]
    command += [
        "--dashboard-port",
        str(dashboard),
        "--dashboard-agent-listen-port",
        str(free_port()),
    ]
    with log.open("wb") as output:
        head = subprocess.Popen(
            command, env=environment, stdout=output, stderr=output, start_new_session=True
        )
    address = f"http://127.0.0.1:{dashboard}"
    deadline = time.monotonic() + 60
    while True:
        listed = subprocess.run(
            [nursery.python, RAY, "job", "list", "--address", address],
            env=environment,
            capture_output=True,
            text=True,
        )
        if listed.returncode == 0:
            break
        assert time.monotonic() < deadline, log.read_text() + listed.stderr
        time.sleep(1)
    yield address
    # Its processes and no others: `ray stop` would end every cluster on this machine.
    for process in [*descendants(psutil.Process(head.pid)), psutil.Process(head.pid)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    head.wait(timeout=60)


def submit(python: str, address: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [python, RAY, "job", "submit", "--address", address, "--working-dir", str(ROOT), "--"]
    return subprocess.run(
        [*command, "python", "-m", "trainer", *arguments],
        env={**os.environ, "RAY_AUTH_MODE": "token"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_a_job_trains_and_its_export_outlives_it(
    nursery: Nursery, jobs_address: str, base_model: Path, tmp_path: Path
) -> None:
    data, output = tmp_path / "pairs.jsonl", tmp_path / "out"
    with data.open("w") as file:
        for number in range(40):
            row = {"prompt": f"Say {number}.", "chosen": f"{number}.", "rejected": f"{number + 1}!"}
            file.write(json.dumps(row) + "\n")
    options = ["--model.path", str(base_model), "--data.train", str(data)]
    options += ["--training.global-batch-pairs", "8", "--training.micro-batch-tokens", "256"]
    options += ["--output-dir", str(output)]
    done = submit(nursery.python, jobs_address, "--config", "quickstart", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "succeeded" in done.stdout
    assert (output / "export" / "scoring_contract.json").exists()


def test_a_relative_output_dir_is_refused(
    nursery: Nursery, jobs_address: str, base_model: Path, tmp_path: Path
) -> None:
    data = tmp_path / "pairs.jsonl"
    data.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n")
    options = ["--model.path", str(base_model), "--data.train", str(data)]
    options += ["--output-dir", "outputs/x"]
    done = submit(nursery.python, jobs_address, "--config", "quickstart", *options)
    assert done.returncode != 0
    assert "error: --output-dir: " in done.stdout + done.stderr
    assert "Traceback" not in done.stdout
