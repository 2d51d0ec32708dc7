"""Engine vllm offline: the scores and the version of `RewardScorer`, or a refusal that says why.

One engine for the file; the service with this engine is in test_vllm_service.py.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from exports import make_export
from foreign import openrlhf
from missing import CPU

from reward_actor import RewardScorer
from reward_actor.contract import ContractError
from reward_actor.errors import EngineDied
from reward_actor.golden import replay
from reward_actor.model.directory import CheckpointError
from reward_actor.model.ensemble import write_ensemble
from reward_actor.model.manifest import write_manifest
from reward_actor.render import Renderer
from reward_actor.vllm.engine import _start
from reward_actor.vllm.scorer import VllmScorer

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason=f"missing: {CPU}")


@pytest.fixture(scope="module")
def directory(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two heads, and a configuration that would put a softmax on them."""
    place = tmp_path_factory.mktemp("vllm") / "two-heads"
    made = make_export(base_model, place, seed=3, heads=["helpful", "honest"], mean=0.5, std=2.0)
    config = json.loads((made / "config.json").read_text())
    config["problem_type"] = "single_label_classification"
    (made / "config.json").write_text(json.dumps(config))
    write_manifest(made)
    return made


@pytest.fixture(scope="module")
def ours(directory: Path) -> RewardScorer:
    return RewardScorer.from_pretrained(directory, "cpu", cache_size=0)


def engine_processes() -> set[psutil.Process]:
    """Of all engines that these tests have started."""
    return {
        process
        for process in psutil.Process().children(recursive=True)
        if process.status() != psutil.STATUS_ZOMBIE and process.name().startswith("VLLM::")
    }


@pytest.fixture(scope="module")
def others(vllm_engine: None) -> set[psutil.Process]:
    """The processes of engines of other tests, which may take a moment to end."""
    return engine_processes()


@pytest.fixture(scope="module")
def theirs(others: set[psutil.Process], directory: Path) -> Iterator[VllmScorer]:
    scorer = VllmScorer.from_pretrained(directory)
    yield scorer
    scorer.close()


def random_rows(max_length: int) -> list[list[int]]:
    """Groups with shared prefixes of all lengths, a single token, and the longest there may be."""
    numbers = np.random.default_rng(0)
    rows = [[7], numbers.integers(3, 290, max_length).tolist()]
    for _ in range(15):
        prompt = numbers.integers(3, 290, numbers.integers(1, 150)).tolist()
        for _ in range(4):
            completion = numbers.integers(3, 290, numbers.integers(1, 120)).tolist()
            rows.append((prompt + completion)[:max_length])
    numbers.shuffle(rows)
    return rows


def largest_difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Relative above 1, as the contract's tolerance is."""
    return float(np.max(np.abs(ours - theirs) / np.maximum(1.0, np.abs(ours))))


def test_it_is_the_same_reward_function(ours: RewardScorer, theirs: VllmScorer) -> None:
    assert theirs.model_version == ours.model_version
    assert theirs.contract == ours.contract
    assert theirs.readout == ours.readout
    assert theirs.dtype == ours.dtype == "float32"
    assert theirs.tokenizer_path == ours.tokenizer_path
    rows = random_rows(ours.contract.max_length)
    expected = ours.raw_scores(rows)
    scores = theirs.raw_scores(rows)
    assert scores.dtype == np.float32
    assert scores.shape == (len(rows), 2)
    assert np.abs(expected).max() > 1, "no activation keeps them below"
    assert largest_difference(expected, scores) < 1e-5
    arrays = [np.array(row, np.int32) for row in rows]  # as they come from an ingress
    again = theirs.raw_scores(arrays, theirs.plan(arrays))
    assert largest_difference(expected, again) < 1e-5, "from the prefix cache"


def test_every_token_has_the_same_scores(ours: RewardScorer, theirs: VllmScorer) -> None:
    rows = random_rows(ours.contract.max_length)
    expected, scores = ours.token_scores(rows), theirs.token_scores(rows)
    assert [row.shape for row in scores] == [(len(row), 2) for row in rows]
    assert largest_difference(np.concatenate(expected), np.concatenate(scores)) < 1e-5


def test_what_fails_in_the_core_is_a_runtime_error(
    theirs: VllmScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU that has no room for the weights."""

    async def wake_up() -> None:
        raise Exception("Call to wake_up method failed: CUDA out of memory")

    monkeypatch.setattr(theirs._engine._engine, "wake_up", wake_up)
    with pytest.raises(RuntimeError, match=r"vLLM could not wake_up: .*out of memory"):
        theirs.restore()
    theirs.check()


@pytest.mark.usefixtures("vllm_engine")
@pytest.mark.parametrize("has_allocator", [True, False])
def test_a_build_without_the_allocator_of_sleep_mode_starts_without_it(
    monkeypatch: pytest.MonkeyPatch, directory: Path, has_allocator: bool
) -> None:
    from vllm.platforms import current_platform
    from vllm.v1.engine.async_llm import AsyncLLM

    monkeypatch.setattr(current_platform, "is_cpu", lambda: False)
    monkeypatch.setattr(current_platform, "is_sleep_mode_available", lambda: True)
    monkeypatch.setattr(current_platform, "is_cumem_allocator_available", lambda: has_allocator)
    monkeypatch.setattr(AsyncLLM, "from_engine_args", lambda arguments: arguments)
    arguments = asyncio.run(_start({"model": str(directory)}, 0.5))
    assert arguments.enable_sleep_mode == has_allocator


def test_nothing_is_scored_without_sequences(theirs: VllmScorer) -> None:
    assert theirs.raw_scores([]).shape == (0, 2)
    assert theirs.token_scores([]) == []


def test_golden_samples_are_replayed_through_the_engine(theirs: VllmScorer) -> None:
    golden = theirs.contract.golden
    wrong = [score + 0.1 for score in golden.raw_scores["float32"]]
    contract = replace(theirs.contract, golden=replace(golden, raw_scores={"float32": wrong}))
    renderer = Renderer(theirs.renderer.tokenizer, contract)
    with pytest.raises(ContractError, match=r"golden sample 0 scores .*vllm engine") as refused:
        replay(renderer, "float32", theirs.raw_scores, "the vllm engine")
    assert f"{golden.raw_scores['float32'][0]:.3f}"[:-1] in str(refused.value)
    assert f"expects {wrong[0]:.7g}" in str(refused.value)


def test_what_vllm_cannot_serve_is_refused_with_a_reason(
    directory: Path, export_dir: Path, tmp_path: Path
) -> None:
    write_ensemble(tmp_path / "ensemble", [directory, export_dir])
    with pytest.raises(ValueError, match="is an ensemble, and engine vllm serves one model"):
        VllmScorer.from_pretrained(tmp_path / "ensemble")
    openrlhf(tmp_path / "openrlhf")
    with pytest.raises(CheckpointError, match=r"layout 'openrlhf'.*Convert it first: rayward conv"):
        VllmScorer.from_pretrained(tmp_path / "openrlhf")
    bare = Path(shutil.copytree(export_dir, tmp_path / "bare"))
    for name in ("MANIFEST.json", "scoring_contract.json"):
        (bare / name).unlink()
    with pytest.raises(CheckpointError, match=r"no scoring_contract.json.*rayward convert"):
        VllmScorer.from_pretrained(bare)
    damaged = Path(shutil.copytree(export_dir, tmp_path / "damaged"))
    (damaged / "config.json").write_text((damaged / "config.json").read_text() + "\n")
    with pytest.raises(CheckpointError, match="differs from its digest"):
        VllmScorer.from_pretrained(damaged)
    with pytest.raises(ValueError, match="dtype is 'int8'"):
        VllmScorer.from_pretrained(export_dir, dtype="int8")


@pytest.mark.long
@pytest.mark.usefixtures("vllm_engine")
def test_a_model_that_is_refused_leaves_no_process(export_dir: Path, tmp_path: Path) -> None:
    before = engine_processes()
    bad = Path(shutil.copytree(export_dir, tmp_path / "bad"))
    contract = json.loads((bad / "scoring_contract.json").read_text())
    contract["golden"]["raw_scores"]["float32"][0] += 0.1
    (bad / "scoring_contract.json").write_text(json.dumps(contract))
    write_manifest(bad)
    with pytest.raises(ContractError, match="golden sample 0 scores"):
        VllmScorer.from_pretrained(bad)
    config = json.loads((bad / "config.json").read_text())
    config["architectures"] = ["BloomForSequenceClassification"]  # whose weights these are not
    (bad / "config.json").write_text(json.dumps(config))
    write_manifest(bad)
    with pytest.raises(ValueError, match="engine could not start"):
        VllmScorer.from_pretrained(bad)
    psutil.wait_procs(engine_processes() - before, timeout=10)
    assert engine_processes() <= before


@pytest.mark.long
@pytest.mark.usefixtures("vllm_engine")
def test_two_processes_share_one_model(export_dir: Path) -> None:
    """Tensor parallelism, which vLLM has on a CPU, too."""
    ours = RewardScorer.from_pretrained(export_dir, "cpu", cache_size=0)
    rows = random_rows(ours.contract.max_length)
    theirs = VllmScorer.from_pretrained(export_dir, tensor_parallel=2)
    try:
        names = [process.name() for process in engine_processes()]
        assert {"VLLM::Worker_TP0", "VLLM::Worker_TP1"} <= {name[:16] for name in names}
        assert largest_difference(ours.raw_scores(rows), theirs.raw_scores(rows)) < 1e-5
    finally:
        theirs.close()


@pytest.mark.long
@pytest.mark.usefixtures("vllm_engine")
def test_bfloat16_is_within_the_bound_of_the_contract(export_dir: Path) -> None:
    theirs = VllmScorer.from_pretrained(export_dir, dtype="bfloat16")
    # Its golden samples have been replayed. Closing tells whoever waits for scores.
    many = np.random.default_rng(0).integers(5, 300, (3000, 200)).tolist()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(theirs.raw_scores, many)
        time.sleep(0.5)
        assert not waiting.done()
        theirs.close()
        assert isinstance(waiting.exception(timeout=30), EngineDied)
    with pytest.raises(EngineDied):
        theirs.raw_scores([[5, 6]])
    ours = RewardScorer.from_pretrained(export_dir, "cpu", dtype="bfloat16")
    assert theirs.model_version == ours.model_version


def test_a_killed_engine_is_reported_and_leaves_no_process(
    others: set[psutil.Process], theirs: VllmScorer
) -> None:
    """The last test of this file with this engine."""
    processes = engine_processes() - others
    assert len(processes) == 2, "the engine core and its worker"
    [core] = [process for process in processes if process.name().startswith("VLLM::EngineCor")]
    theirs.check()
    os.kill(core.pid, signal.SIGKILL)
    with pytest.raises(EngineDied):
        theirs.raw_scores(random_rows(256) * 20)
    with pytest.raises(EngineDied):
        theirs.check()
    theirs.close()
    theirs.close()
    psutil.wait_procs(processes, timeout=10)
    assert engine_processes() <= others
