"""A tiny run of the rollout benchmark."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from missing import skip_without

pytestmark = pytest.mark.process

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_tiny_run_of_every_workload(tmp_path: Path) -> None:
    if find_spec("vllm") is None:
        skip_without("vLLM")
    output = tmp_path / "rollout.json"
    command = [sys.executable, "-m", "benchmarks.rollout", "--shape", "tiny", "--rounds", "1"]
    done = subprocess.run(
        [*command, "--output", str(output)], cwd=ROOT, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(output.read_text())
    measured = result["measurements"]
    assert measured.keys() == {
        "overlap",
        "overlap-simulated",
        "transport",
        "actors",
        "weights tiny",
    }
    assert len(measured["transport"]) == 4
    assert measured["actors"].keys() == {"1", "2", "4"}
    assert len(measured["weights tiny"]) == 5
    for by_label in measured.values():
        for figures in by_label.values():
            assert all(number["median"] > 0 for number in figures.values())
    assert result["skipped"] == {}
    for target in result["targets"]:
        assert target["what"] in done.stdout
