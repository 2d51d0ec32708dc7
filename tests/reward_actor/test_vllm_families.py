"""Exports of every family in a real vLLM pooling engine: the same raw scores.

`pytest tests/reward_actor/test_vllm_families.py -rP` prints the largest difference for each family.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from families import FAMILIES, make_network
from missing import CPU

from reward_actor import RewardScorer
from reward_actor.export import export
from reward_actor.model.inferred import contract_for
from reward_actor.model.tokenizer import load_tokenizer
from reward_actor.vllm.scorer import VllmScorer

if TYPE_CHECKING:
    from nursery import Nursery

pytestmark = [
    pytest.mark.usefixtures("vllm_engine"),
    pytest.mark.skipif(torch.cuda.is_available(), reason=f"missing: {CPU}"),
]

# Longer than the window of the sliding families, and one that a group shares a prefix with.
ROWS = [list(range(5, 30)), [*range(5, 25), 90, 91, 92], [40, 6, 8], [250, 251, 252, 253] * 5]

# Relative above a score of 1. vLLM's CPU kernel approximates the tanh of soft-capped attention:
# without the cap gemma2 differs by 1e-7.
TOLERANCE = {"gemma2": 5e-4}

# vLLM 0.32 has BLOOM for generation only: its loader puts "transformer." before every name, the
# head's too, so that no BLOOM sequence classifier loads, whoever saved it.
WITHOUT_POOLING = ("bloom",)

# What engine vllm says of the two.
REFUSED = {"gemma2": "golden sample", "bloom": "engine could not start"}

# An engine belongs in a process of its own: vLLM spawns, and keeps its memory to the end.
ENGINE = """
import json, sys

if __name__ == "__main__":
    from vllm import LLM

    engine = LLM(
        model=sys.argv[1],
        runner="pooling",
        dtype="float32",
        enforce_eager=True,
        max_model_len=64,
        enable_prefix_caching=False,
        enable_chunked_prefill=False,
        disable_log_stats=True,
    )
    prompts = [{"prompt_token_ids": row} for row in json.loads(sys.argv[2])]
    scores = [output.outputs.probs for output in engine.classify(prompts, use_tqdm=False)]
    print("SCORES", json.dumps(scores))
"""


def vllm_scores(python: str, directory: Path, rows: list[list[int]], scratch: Path) -> list[float]:
    script = scratch / "engine.py"
    script.write_text(ENGINE)
    environment = {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [python, str(script), str(directory), json.dumps(rows)],
        capture_output=True,
        text=True,
        timeout=400,
        env=environment,
    )
    found = [line for line in done.stdout.splitlines() if line.startswith("SCORES ")]
    errors = [line for line in (done.stdout + done.stderr).splitlines() if "Error: " in line]
    assert found, "\n".join(line[:500] for line in errors)
    return [score for (score,) in json.loads(found[0].removeprefix("SCORES "))]


def export_family(family: str, base_model: Path, directory: Path) -> Path:
    network = make_network(family)
    tokenizer = load_tokenizer(base_model)
    contract = contract_for(tokenizer, network.config, format="chat", max_length=64)
    weights = network.state_dict()
    export(directory, network.config, network, weights, tokenizer, contract, {}, "cpu")
    return directory


def largest_difference(python: str, directory: Path, tmp_path: Path) -> float:
    ours = RewardScorer.from_pretrained(directory, "cpu").raw_scores(ROWS).ravel().tolist()
    theirs = vllm_scores(python, directory, ROWS, tmp_path)
    assert len({round(score, 3) for score in theirs}) > 1
    return max(abs(a - b) / max(1.0, abs(a)) for a, b in zip(ours, theirs, strict=True))


def test_vllm_gives_the_same_raw_scores(nursery: Nursery, export_dir: Path, tmp_path: Path) -> None:
    assert largest_difference(nursery.python, export_dir, tmp_path) < 1e-5


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES)
def test_vllm_gives_the_same_raw_scores_of(
    nursery: Nursery, family: str, base_model: Path, tmp_path: Path
) -> None:
    directory = export_family(family, base_model, tmp_path / "export")
    if family in WITHOUT_POOLING:
        with pytest.raises(AssertionError, match="no module or parameter named 'score'"):
            vllm_scores(nursery.python, directory, ROWS, tmp_path)
        return
    difference = largest_difference(nursery.python, directory, tmp_path)
    print(f"{family}: largest difference {difference:.2g}")
    assert difference < TOLERANCE.get(family, 1e-5)


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES)
def test_engine_vllm_holds_to_the_contract_of(
    family: str, base_model: Path, tmp_path: Path
) -> None:
    """Served to 1e-5, with the prefix cache and for every token; or refused when it is loaded."""
    directory = export_family(family, base_model, tmp_path / "export")
    if family in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[family]):
            VllmScorer.from_pretrained(directory)
        return
    ours = RewardScorer.from_pretrained(directory, "cpu", cache_size=0)
    theirs = VllmScorer.from_pretrained(directory)
    rows = [row for row in ROWS for _ in range(3)]
    try:
        scores, tokens = theirs.raw_scores(rows), theirs.token_scores(rows)
    finally:
        theirs.close()
    assert ours.raw_scores(rows) == pytest.approx(scores, rel=1e-5, abs=1e-5)
    for row, right in zip(tokens, ours.token_scores(rows), strict=True):
        assert row == pytest.approx(right, rel=1e-5, abs=1e-5)
