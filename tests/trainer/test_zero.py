"""Real trainings: Ray Train workers under each stage of DeepSpeed ZeRO, and what they export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from trainer_runs import log_of, overrides, settings, write_pairs

from reward_actor.scorer import RewardScorer
from trainer import worker
from trainer.config.config_file import load_config
from trainer.config.train import TrainConfig
from trainer.data.prepare import prepare
from trainer.errors import TrainingError
from trainer.evaluation.metrics import EvalResult, evaluate
from trainer.job import Job, RunFacts
from trainer.run import TrainResult, train

if TYPE_CHECKING:
    from trainer.data.comparisons import Comparisons

STAGES = (0, 1, 2, 3)
NUM_STEPS = 50
SLOWLY = {"training__max_steps": NUM_STEPS, "optimizer__learning_rate": 0.002}
"""So that there is still a loss to compare at the end."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl")


@pytest.fixture(scope="module")
def runs(ray_cluster, base_model, data, tmp_path_factory) -> dict[str, Path]:
    """The directories of trainings under every stage in float32, and in bfloat16 under the first
    and the last; one group of workers does them in turn, which saves their start-up."""
    import ray.train
    from ray.train.torch import TorchTrainer

    root = tmp_path_factory.mktemp("runs")
    todo = {}
    for dtype, stage in [*(("float32", s) for s in STAGES), ("bfloat16", 0), ("bfloat16", 3)]:
        name = f"{dtype}-{stage}"
        changes = {"model__dtype": dtype, "distributed__zero_stage": stage, **SLOWLY}
        config = load_config(None, overrides(settings(base_model, data, root / name, **changes)))
        (root / name).mkdir()
        prepared, contract = prepare(config)
        facts = RunFacts.of(prepared, NUM_STEPS)
        todo[name] = Job(config, contract, ray.put(prepared), facts, {})

    def train_all(todo: list[Job]) -> None:
        for job in todo:
            worker.run_training_loop(job)

    scaling = ray.train.ScalingConfig(num_workers=2)
    run_config = ray.train.RunConfig(name="all", storage_path=str(root))
    TorchTrainer(
        train_all,
        train_loop_config=list(todo.values()),
        scaling_config=scaling,
        run_config=run_config,
    ).fit()
    return {name: root / name for name in todo}


@pytest.fixture(scope="module")
def alone(ray_cluster, base_model, data, tmp_path_factory) -> TrainResult:
    """The same training from front to back, by one worker and in other forward passes."""
    changes = {"distributed__num_workers": 1, "training__micro_batch_tokens": 150, **SLOWLY}
    output_dir = tmp_path_factory.mktemp("alone") / "run"
    values = settings(base_model, data, output_dir, **changes)
    return train(load_config(None, overrides(values)), say=lambda _: None)


def heldout_of(run: Path) -> Comparisons:
    return prepare(config_of(run))[0].heldout


def sequences_of(comparisons: Comparisons) -> list[list[int]]:
    return [comparisons.sequence(i) for i in range(comparisons.num_sequences)]


def evaluated(scorer: RewardScorer, comparisons: Comparisons) -> EvalResult:
    reading = scorer.readout.read(scorer.raw_scores(sequences_of(comparisons)))
    return evaluate(comparisons, reading.raw_scores, reading.rewards)


def config_of(run: Path) -> TrainConfig:
    text = (run / "export" / "resolved_config.json").read_text(encoding="utf-8")
    return TrainConfig.model_validate_json(text)


def curve(run: Path) -> list[tuple[float, ...]]:
    keys = ("loss", "grad_norm", "learning_rate", "accuracy", "raw_margin")
    return [tuple(line[key] for key in keys) for line in log_of(run)]


def test_the_stages_train_alike(runs: dict[str, Path]):
    expected = curve(runs["float32-0"])
    assert len(expected) == NUM_STEPS
    for stage in STAGES[1:]:
        np.testing.assert_allclose(curve(runs[f"float32-{stage}"]), expected, rtol=1e-4, atol=1e-4)


def test_any_number_of_workers_trains_alike(runs: dict[str, Path], alone: TrainResult):
    """The loss is the mean over the global batch, however it is cut up, last batch included."""
    one, two = curve(alone.export_dir.parent), curve(runs["float32-2"])
    np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-4)


def test_training_lowers_the_loss(runs: dict[str, Path]):
    for name, run in runs.items():
        losses = [line["loss"] for line in log_of(run)]
        assert np.mean(losses[-4:]) < 0.6 * np.mean(losses[:4]), name
        assert json.loads((run / "result.json").read_text())["heldout_accuracy"] > 0.9, name


def test_the_log_tells_every_step(runs: dict[str, Path]):
    lines = log_of(runs["float32-2"])
    assert [line["step"] for line in lines] == list(range(1, NUM_STEPS + 1))
    assert [line["epoch"] for line in lines] == [step // 4 for step in range(NUM_STEPS)]
    for line in lines:
        assert line["min_raw_score"] <= line["mean_raw_score"] <= line["max_raw_score"]
        assert not any("reward" in key for key in line), "there is no normalisation yet"
        assert 0 <= line["accuracy"] <= 1
        assert min(line["pairs_per_s"], line["tokens_per_s"], line["memory_mb"]) > 0


def test_every_export_scores_as_its_training_did(runs: dict[str, Path]):
    """Exactly in float32. In bfloat16 training and scoring round other sums: within the bound that
    the export has measured of itself."""
    for name, run in runs.items():
        heldout = heldout_of(run)
        dtype = name.partition("-")[0]
        scorer = RewardScorer.from_pretrained(run / "export")
        assert scorer.dtype == dtype
        result = evaluated(scorer, heldout)
        trained = json.loads((run / "result.json").read_text())
        assert trained["heldout_num_pairs"] == len(heldout)
        bound = scorer.contract.golden.tolerance[dtype]
        for key in ("raw_margin", "min_raw_score", "mean_raw_score", "max_raw_score"):
            assert getattr(result, key) == pytest.approx(trained[f"heldout_{key}"], abs=bound), name
        scaled = max(bound, bound / scorer.contract.std)
        for key in ("reward_margin", "min_reward", "mean_reward", "max_reward"):
            assert getattr(result, key) == pytest.approx(trained[f"heldout_{key}"], abs=scaled)
        assert trained["heldout_mean_reward"] == pytest.approx(0, abs=1e-6)
        raw_scores = scorer.raw_scores(sequences_of(heldout))[:, 0]
        found = scorer.contract.held_out
        assert found is not None
        assert found.num_scores == heldout.num_sequences
        expected = np.quantile(raw_scores, np.linspace(0, 1, 101))
        np.testing.assert_allclose(
            found.quantiles, expected, atol=bound * max(1, abs(expected[-1]))
        )


def test_the_stages_export_the_same_rewards(runs: dict[str, Path]):
    heldout = heldout_of(runs["float32-0"])
    rows = sequences_of(heldout)
    scores = [
        RewardScorer.from_pretrained(runs[f"float32-{stage}"] / "export").score_ids(rows)
        for stage in STAGES
    ]
    for other in scores[1:]:
        np.testing.assert_allclose(other, scores[0], rtol=1e-3, atol=1e-4)


def test_bfloat16_stays_close_to_float32(runs: dict[str, Path]):
    """Adam's first steps would differ if a stage kept no float32 weights or counted steps wrong."""
    whole = [line["loss"] for line in log_of(runs["float32-0"])]
    for stage in (0, 3):
        rounded = [line["loss"] for line in log_of(runs[f"bfloat16-{stage}"])]
        np.testing.assert_allclose(rounded[:4], whole[:4], atol=0.02)


def test_the_export_tells_where_it_comes_from(alone: TrainResult):
    export = alone.export_dir
    card = (export / "README.md").read_text(encoding="utf-8")
    assert f"On {alone.metrics['heldout_num_pairs']} held-out pairs" in card
    assert "rayward serve" in card
    log = (export / "training_log.jsonl").read_text()
    assert log == (export.parent / "training_log.jsonl").read_text()
    assert json.loads((export / "config.json").read_text())["problem_type"] == "regression"


def test_a_finished_run_is_not_run_again(alone: TrainResult):
    said: list[str] = []
    again = train(config_of(alone.export_dir.parent), say=said.append)
    assert "this run is finished already; nothing to do" in said
    assert again.metrics == alone.metrics


def test_a_loss_that_is_not_finite_stops_the_run(ray_cluster, base_model, data, tmp_path: Path):
    changes = {"optimizer__learning_rate": 1e30, "optimizer__warmup_fraction": 0}
    values = settings(base_model, data, tmp_path / "nan", **changes)
    with pytest.raises(TrainingError, match=r"step \d, rank \d: the (loss|gradient)"):
        train(load_config(None, overrides(values)), say=lambda _: None)


def test_a_cluster_that_is_too_small_is_told_at_once(ray_cluster, base_model, data, tmp_path: Path):
    changes = {"distributed__cpus_per_worker": 500}
    values = settings(base_model, data, tmp_path / "big", **changes)
    with pytest.raises(ValueError, match="the Ray cluster is too small: 1000 CPU asked for"):
        train(load_config(None, overrides(values)), say=lambda _: None)
