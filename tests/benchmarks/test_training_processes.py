"""The training benchmark in processes of its own: on the trainer's engine, and without it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from training_flags import FLAGS

if TYPE_CHECKING:
    from nursery import Nursery

pytestmark = pytest.mark.process

ROOT = Path(__file__).resolve().parents[2]


def test_a_tiny_run_takes_turns_on_the_trainers_engine(nursery: Nursery, tmp_path: Path) -> None:
    output = tmp_path / "training.json"
    command = [nursery.python, "-m", "benchmarks.training", *FLAGS.split(), "--output", str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    result = json.loads(output.read_text())
    assert result["engine"] == "deepspeed, ZeRO 2"
    assert "deepspeed" in result["versions"]
    ours, padded = (result["workloads"]["synthetic"]["peers"][p] for p in ("ours", "padded"))
    assert ours["num_computed_tokens"] < padded["num_computed_tokens"]
    assert 0 < padded["max_difference"]["pair_loss"] < 1e-4


def test_plain_torch_needs_torch_and_transformers_only(tmp_path: Path) -> None:
    flags = [*FLAGS.split(), "--engine", "torch", "--lora", "2", "--output", f"{tmp_path}/o.json"]
    code = (
        "import sys\n"
        "for name in ('ray', 'pydantic', 'httpx', 'rich', 'deepspeed', 'peft', 'accelerate'):\n"
        "    sys.modules[name] = None\n"
        f"from benchmarks.training.__main__ import main\nsys.exit(main({flags!r}))\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "o.json").read_text())["lora_rank"] == 2
