"""The scoring benchmark's processes: one tiny run of it, and what our path needs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks.scoring.__main__ import main

if TYPE_CHECKING:
    from nursery import Nursery

pytestmark = pytest.mark.process

ROOT = Path(__file__).resolve().parents[2]


def test_a_tiny_run_writes_every_figure(
    nursery: Nursery,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "executable", nursery.python)  # where its peers come from
    output = tmp_path / "scoring.json"
    flags = (
        "--shape tiny --device cpu --dtype float32 --rounds 2 --threads 1 --workload grpo "
        "--groups 2 --group-size 4 --prompt-tokens 8 --completion-tokens 4..8 "
        "--workload unique --sequences 5 --sequence-tokens 4..12 "
        "--peers ours,padded_16,padded_sorted,flash"
    )
    assert main([*flags.split(), "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "skipped: flash" in printed
    result: dict[str, Any] = json.loads(output.read_text())
    assert {"machine", "versions", "preloads", "matmul", "arguments"} <= result.keys()
    assert (result["device"], result["dtype"], result["rounds"]) == ("cpu", "float32", 2)
    assert result["shape"] == {"name": "tiny", "layer_parameters": 61_440}
    assert result["peers"]["ours"]["path"]
    assert result["peers"]["padded_sorted"]["batch_size"].keys() == {"grpo", "unique"}
    assert result["workloads"].keys() == {"grpo", "unique"}
    for workload in result["workloads"].values():
        assert workload["num_prefix_tokens"] <= workload["num_tokens"]
        assert list(workload["peers"]) == ["ours", "padded_16", "padded_sorted"]
        for peer, figures in workload["peers"].items():
            assert peer in printed
            assert len(figures["seconds"]) == 2
            assert figures["min_s"] <= figures["median_s"] <= figures["max_s"]
            assert figures["max_abs_diff"] <= result["tolerance"]
            for name in ("effective_tokens_per_s", "share_of_matmul", "peak_memory_bytes"):
                assert figures[name] > 0


def test_our_path_needs_torch_and_transformers_only() -> None:
    code = (
        "import sys\n"
        "for name in ('ray', 'vllm', 'pydantic', 'httpx', 'rich', 'deepspeed', 'fastapi'):\n"
        "    sys.modules[name] = None\n"
        "import benchmarks.scoring.peers, benchmarks.common.probe, benchmarks.scoring.__main__\n"
        "import torch\n"
        "from benchmarks.common.shapes import SHAPES, build_network\n"
        "from reward_actor.engine.engine import Engine\n"
        "from reward_actor.model.reward_model import RewardModel\n"
        "network = build_network(SHAPES['tiny'], torch.float32, 'cpu')\n"
        "print(Engine(RewardModel(network)).raw_scores([[5, 6, 7], [5, 6]]).shape)\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(2, 1)"
