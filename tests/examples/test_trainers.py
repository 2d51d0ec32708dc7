"""A few steps of the trainers in examples/, with a real engine, service and DeepSpeed; whole curves
in `make test-long`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpo
import ppo
import pytest
import rejection_sampling
import torch
import trl_grpo
from policy_gradient import Batch, pool_of, sampled, trained

from reward_actor.rollout import RolloutPool, Sampling

if TYPE_CHECKING:
    from engines import OnWorkers

PROMPTS = ["Name two fruits.", "Hi.", "Count to three.", "Name a bird."]
TRAINER = {"grpo": grpo, "ppo": ppo}


@pytest.fixture(scope="module")
def files(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What the trainers are told of policy and prompts."""
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    return [str(base_model), str(prompts)]


def told(files: list[str], out: Path, scorer: str, *more: str) -> list[str]:
    sizes = ["--batch", "3", "--completions", "4", "--max-tokens", "8", "--max-model-len", "64"]
    return [*files, str(out), "--scorer", scorer, *sizes, *more]


@pytest.fixture(scope="module")
def pool(vllm_engine: None, service: str, files: list[str]) -> Iterator[RolloutPool]:
    with pool_of(grpo.parser().parse_args(told(files, Path(), service))) as started:
        yield started


@pytest.mark.parametrize(
    ("name", "options"),
    [("grpo", []), ("grpo", ["--ahead", "1", "--no-std"]), ("ppo", ["--critic", "EXPORT"])],
)
def test_three_steps_change_the_policy_and_what_the_pool_samples(
    name: str, options: list[str], files: list[str], pool: RolloutPool, service: str,
    export_dir: Path, base_model: Path, tmp_path: Path,
) -> None:  # fmt: skip
    from transformers import AutoModelForCausalLM

    pool.update_weights(base_model)
    more = [str(export_dir) if option == "EXPORT" else option for option in options]
    sizes = ["--steps", "3", "--part", "5", "--learning-rate", "1e-3"]
    trainer: Any = TRAINER[name]
    trainer.train(trainer.parser().parse_args(told(files, tmp_path, service, *sizes, *more)), pool)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [0, 1, 2]
    assert log[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert log[2]["kl"] > 0 or name == "ppo"  # PPO's estimate may be below 0
    assert all(row["gradient_norm"] > 0 for row in log)
    first, last = (
        AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
        for place in (base_model, tmp_path)
    )
    batch = Batch.of(list(pool.rollouts(PROMPTS, Sampling(2, max_tokens=8))), 0)
    with torch.no_grad():
        old, new = (batch.log_probs(each) * batch.is_sampled for each in (first, last))
    assert (new - batch.old_log_probs).abs().max() < 2e-3
    assert (old - batch.old_log_probs).abs().max() > 2e-2


def test_a_step_without_any_reward_says_why(pool: RolloutPool) -> None:
    steps = sampled(pool, [["word " * 200]], Sampling(2, max_tokens=8), 0)
    with pytest.raises(ValueError, match=r"step 0: no completion has a reward.*the policy takes"):
        next(steps)


@pytest.mark.parametrize("options", [[], ["--asynchronous"]])
def test_trl_trains_on_a_service(
    options: list[str], files: list[str], service: str, tmp_path: Path
) -> None:
    sizes = ["--steps", "3", "--batch", "2", "--completions", "4", "--max-tokens", "8"]
    arguments = [*files, str(tmp_path), "--scorer", service, *sizes, *options]
    trl_grpo.train(trl_grpo.parser().parse_args(arguments))
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [1, 2, 3]
    assert all(math.isfinite(row["reward"]) for row in log)
    assert (tmp_path / "model.safetensors").exists()


def test_a_round_of_rejection_sampling(
    files: list[str], pool: RolloutPool, service: str, base_model: Path, tmp_path: Path
) -> None:
    pool.update_weights(base_model)
    sizes = ["--rounds", "1", "--steps", "2", "--completions", "4"]
    arguments = told(files, tmp_path, service, *sizes)
    rejection_sampling.run(rejection_sampling.parser().parse_args(arguments), pool)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    for row in log:
        best = list(row["reward_of_the_best_of"].values())
        assert best == sorted(best)
        assert len(best) == 3
    kept = [json.loads(line) for line in (tmp_path / "best1.jsonl").read_text().splitlines()]
    pairs = [json.loads(line) for line in (tmp_path / "pairs1.jsonl").read_text().splitlines()]
    assert [row["completion"] for row in kept] == [row["chosen"] for row in pairs]
    mean = sum(row["reward"] for row in kept) / 3
    assert mean == pytest.approx(log[0]["reward_of_the_best_of"]["4"], abs=1e-6)
    assert (tmp_path / "policy1" / "model.safetensors").exists()


def step_both_ways() -> list[float]:
    """The largest differences of weights and of gradient norms, DeepSpeed's from PyTorch's."""
    torch.manual_seed(0)
    inputs = torch.randn(2, 4, 8)
    weights, norms = [], []
    for deepspeed in (False, True):
        torch.manual_seed(1)
        network = torch.nn.Linear(8, 1)
        by = trained(network, 1e-2, deepspeed=deepspeed)
        for _ in range(3):
            for part, last in zip(inputs, (False, True), strict=True):
                by.backward(by.forward(part).square().mean(), is_last=last)
            norms.append(by.step())
        weights.append(network.weight.detach().clone())
    gaps = [abs(a - b) for a, b in zip(norms[:3], norms[3:], strict=True)]
    return [float((weights[0] - weights[1]).abs().max()), max(gaps)]


def test_deepspeed_steps_as_pytorch_does(on_workers: OnWorkers) -> None:
    for differences in on_workers(1, step_both_ways):
        assert max(differences) < 1e-5
