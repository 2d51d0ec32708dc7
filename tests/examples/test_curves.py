"""Whole trainings after the whole demo: the reward rises, and a renewed reward model is the better
judge."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from isolation import environment_for_a_cluster, free_port

from benchmarks.learning import runs

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("vllm_engine"), pytest.mark.timeout(1200)]

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("demo")
    environment = environment_for_a_cluster() | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(runs.EXAMPLES / "demo.py")]
    subprocess.run(command, cwd=place, env=environment, check=True, stdout=subprocess.DEVNULL)
    return place / "outputs" / "demo"


@pytest.fixture(scope="module")
def url(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with runs.service(demo, tmp_path_factory.mktemp("service") / "log") as address:
        yield address


@pytest.mark.parametrize("name", list(runs.TRAINERS))
def test_the_reward_rises(name: str, demo: Path, url: str, tmp_path: Path) -> None:
    log = runs.train(name, demo, tmp_path, url, seed=0)
    rise = runs.rise([row["reward"] for row in log])
    assert len(log) == 60
    assert rise["standard_errors"] >= 2


def test_the_best_of_more_is_better_and_so_is_who_is_trained_on_it(
    demo: Path, tmp_path: Path
) -> None:
    given = (demo / "policy", demo / "data" / "train.jsonl", tmp_path)
    runs.run("rejection_sampling.py", *given, "--scorer", demo / "reward-model" / "export")
    rounds = [row["reward_of_the_best_of"] for row in runs.log_of(tmp_path / "log.jsonl")]
    for row in rounds:
        assert list(row.values()) == sorted(row.values())
    means = [row["1"] for row in rounds]
    assert means == sorted(means)
    assert means[-1] > rounds[0]["2"]


def test_a_reward_model_that_is_trained_further_judges_better(demo: Path, tmp_path: Path) -> None:
    out = tmp_path / "loop"
    runs.run("online_rm.py", demo, out, "--port", free_port(), "--rounds", "2")
    for row in runs.log_of(out / "rounds.jsonl"):
        assert row["accuracy_of_the_next"]["mean"] > row["accuracy"]["mean"]
        assert len(row["num_answers_during_the_swap"]) == 2  # by the old version, then by the new
