"""Interrupted trainings: real signals to a real `rayward train`, and the same command again."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import ray
import torch
from engines import OnWorkers, train_without_ray
from isolation import environment_for_a_cluster
from processes import titled
from safetensors.numpy import load_file
from trainer_runs import log_of, overrides, settings, write_pairs

from trainer.checkpoints.manifest import SavedState, survey
from trainer.checkpoints.run_directory import finished
from trainer.checkpoints.storage import checkpoint_storage
from trainer.config.config_file import load_config
from trainer.config.train import TrainConfig
from trainer.data.prepare import prepare
from trainer.run import resolve_paths, train

if TYPE_CHECKING:
    from nursery import Nursery

# Many more than a worker takes while a signal is on its way.
NUM_STEPS = 100
EVERY = 10


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl")


def config_for(base_model: Path, data: Path, output_dir: Path, **changes: Any) -> TrainConfig:
    changes = {
        "training__max_steps": NUM_STEPS,
        "checkpoint__every_steps": EVERY,
        "evaluation__every_steps": 2 * EVERY,
        **changes,
    }
    return load_config(None, overrides(settings(base_model, data, output_dir, **changes)))


def config_in(output_dir: Path) -> TrainConfig:
    text = (output_dir / "export" / "resolved_config.json").read_text()
    return TrainConfig.model_validate_json(text)


def start(python: str, config: TrainConfig, cluster: str | None = None) -> subprocess.Popen[str]:
    """On the cluster at this address, or on one of its own, from a directory with modules of a user
    that are called as ours are."""
    file = Path(config.output_dir).with_suffix(".yaml")
    file.write_text(config.model_dump_json())  # JSON is YAML
    for name in ("trainer", "serve"):
        file.with_name(f"{name}.py").write_text("raise RuntimeError('a module of the user')")
    return subprocess.Popen(
        [python, "-m", "rayward", "train", "--config", str(file)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=file.parent,
        env=environment_for_a_cluster()
        | {"PYTHONPATH": str(Path(__file__).parents[2])}
        | ({} if cluster is None else {"RAY_ADDRESS": cluster}),
    )


def states_of(config: TrainConfig) -> list[SavedState]:
    try:
        return survey(checkpoint_storage(config)).states
    except FileNotFoundError:  # deleted while it is looked at
        return states_of(config)


def kill_after_step(process: subprocess.Popen[str], config: TrainConfig, step: int, by: int) -> str:
    """Wait for a checkpoint at `step` or later, send the signal; what was printed. No other
    training may run."""
    deadline = time.monotonic() + 240
    while not any(state.step >= step for state in states_of(config)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    workers = titled("ray::RayTrainWorker")
    assert len(workers) == 2
    process.send_signal(by)
    out, err = process.communicate(timeout=60)
    _, alive = psutil.wait_procs(workers, timeout=60)  # until then they may store another one
    assert not alive
    assert not (Path(config.output_dir) / "result.json").exists(), "it was too fast to interrupt"
    return out + err


@pytest.fixture(scope="module")
def interrupted(
    on_workers: OnWorkers, nursery: Nursery, ray_cluster, base_model, data, tmp_path_factory
) -> tuple[Path, Path, list[str]]:
    """The directory of a run that was interrupted, killed and damaged, one that was not, and what
    the three processes of the first printed."""
    root = tmp_path_factory.mktemp("resume")
    whole = resolve_paths(config_for(base_model, data, root / "whole"))
    prepared, contract = prepare(whole)
    on_workers(2, train_without_ray, whole, contract, prepared, NUM_STEPS)
    config = config_for(base_model, data, root / "broken")
    run_dir = Path(checkpoint_storage(config).root)
    printed = [kill_after_step(start(nursery.python, config), config, EVERY, signal.SIGINT)]
    half = run_dir / "checkpoint_half"
    (half / "state").mkdir(parents=True)
    (half / "state" / "zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"half")
    last = states_of(config)[0].step
    shared = ray.get_runtime_context().gcs_address
    process = start(nursery.python, config, shared)
    printed.append(kill_after_step(process, config, last + EVERY, signal.SIGKILL))
    assert not half.exists()
    weights = next((run_dir / states_of(config)[0].folder).rglob("*model_states.pt"))
    weights.write_bytes(bytes([weights.read_bytes()[0] ^ 1]) + weights.read_bytes()[1:])
    process = start(nursery.python, config, shared)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return root / "broken", root / "whole", [*printed, out + err]


def test_the_same_command_ends_with_the_same_weights(interrupted):
    broken, whole, _ = interrupted
    ours = load_file(broken / "export" / "model.safetensors")
    expected = load_file(whole / "export" / "model.safetensors")
    assert ours.keys() == expected.keys()
    for name, weight in expected.items():
        assert (ours[name] == weight).all(), name


@pytest.fixture(scope="module")
def restarted(interrupted, base_model, data, tmp_path_factory) -> Path:
    """The directory of a run of which a worker and an evaluation beside it were killed."""
    output_dir = tmp_path_factory.mktemp("restarted") / "run"
    config = config_for(base_model, data, output_dir, evaluation__asynchronous=True)
    ended = threading.Event()
    killer = threading.Thread(target=kill, args=(config, [EVERY, 3 * EVERY], ended))
    killer.start()
    try:
        train(config, say=lambda _: None)
    finally:
        ended.set()
        killer.join()
    return output_dir


killed: list[str] = []


def kill(config: TrainConfig, steps: list[int], ended: threading.Event) -> None:
    """SIGKILL a worker and an evaluation, each as soon as a checkpoint of its step is there."""
    order = [("RayTrainWorker", 1), ("_evaluate", 0)]
    for step, (name, number) in zip(steps, order, strict=True):
        while not any(state.step >= step for state in states_of(config)):
            if ended.wait(0.02):
                return
        while len(found := titled(f"ray::{name}")) <= number:
            if ended.wait(0.02):
                return
        sorted(found, key=lambda process: process.pid)[number].kill()
        killed.append(name)


def test_a_killed_worker_changes_nothing(restarted, interrupted):
    assert killed == ["RayTrainWorker", "_evaluate"]
    whole = interrupted[1]
    ours = load_file(restarted / "export" / "model.safetensors")
    for name, weight in load_file(whole / "export" / "model.safetensors").items():
        assert (ours[name] == weight).all(), name
    assert [line["loss"] for line in log_of(restarted)] == [line["loss"] for line in log_of(whole)]
    newest = [
        Path(checkpoint_storage(config_in(run)).path(states_of(config_in(run))[0].folder))
        for run in (restarted, whole)
    ]
    names = sorted(path.relative_to(newest[1]) for path in newest[1].rglob("*optim_states.pt"))
    assert len(names) == 2
    for name in names:
        mine, theirs = (
            torch.load(folder / name, weights_only=False)["optimizer_state_dict"]
            for folder in newest
        )
        assert same(mine, theirs), name


def same(left: Any, right: Any) -> bool:
    """Whether two trees of tensors are equal bit for bit."""
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right) if isinstance(left, int | float | str | None) else True


def test_evaluations_beside_the_training_say_the_same(restarted, interrupted):
    ours, expected = (
        [json.loads(line) for line in (run / "evaluations.jsonl").open()]
        for run in (restarted, interrupted[1])
    )
    assert [line["step"] for line in ours] == [line["step"] for line in expected]
    for mine, theirs in zip(ours, expected, strict=True):
        for key, value in theirs.items():
            if isinstance(value, float):
                assert mine[key] == pytest.approx(value, abs=1e-5), key


def test_exports_hold_no_pickle(interrupted):
    files = {path.suffix for path in (interrupted[1] / "export").rglob("*") if path.is_file()}
    assert files <= {".json", ".jsonl", ".jinja", ".safetensors", ".md", ".png", ".html"}


def test_the_log_has_every_step_once(interrupted):
    broken, whole, _ = interrupted
    ours, expected = log_of(broken), log_of(whole)
    assert [line["step"] for line in ours] == list(range(1, NUM_STEPS + 1))
    assert [line["loss"] for line in ours] == [line["loss"] for line in expected]


def test_it_is_told_in_plain_words(interrupted):
    first, _, last = interrupted[2]
    assert "interrupted; the same command resumes from the last checkpoint" in first
    assert "Traceback" not in first
    assert "(state/mp_rank_00_model_states.pt does not have the sha256 of its manifest)" in last
    assert "is taken, they are deleted" in last
    assert "resuming after step" in last
    assert "the reward model is in" in last


def test_only_the_newest_checkpoints_are_kept(interrupted):
    states = states_of(config_in(interrupted[0]))
    assert [state.step for state in states] == [NUM_STEPS, NUM_STEPS - EVERY]


def test_a_lost_export_is_written_again(on_workers: OnWorkers, interrupted):
    whole = interrupted[1]
    config = config_in(whole)
    prepared, contract = prepare(config)
    before = (whole / "export" / "model.safetensors").read_bytes()
    log = (whole / "training_log.jsonl").read_bytes()
    assert finished(whole) is not None
    shutil.rmtree(whole / "export")
    assert finished(whole) is None
    on_workers(2, train_without_ray, config, contract, prepared, NUM_STEPS)
    assert (whole / "export" / "model.safetensors").read_bytes() == before
    assert (whole / "training_log.jsonl").read_bytes() == log, "no step was made again"
