"""Rollouts from a real vLLM engine in a Ray actor, scored where they are made."""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from reward_actor import Group, RewardScorer
from reward_actor.rollout.pool import sample, start_rollout_actors
from reward_actor.rollout.records import Sampling, VllmSettings

if TYPE_CHECKING:
    from nursery import Nursery

PROMPTS: list[Any] = ["Name two fruits.", [{"role": "user", "content": "Hi."}], "Count to three."]
SAMPLING = Sampling(num_completions=3, max_tokens=12, seed=7)


@pytest.fixture(scope="module")
def actors(vllm_engine: None, service: str, base_model: Path) -> Iterator[list[Any]]:
    """One engine for the module; its completions are scored by the service over its handle."""
    import ray

    num_gpus = int(torch.cuda.is_available())
    engine = VllmSettings(
        str(base_model), num_gpus, max_model_len=128, dtype="float32", cpu_threads=2
    )
    started = start_rollout_actors(engine, 1, "rayward")
    yield started
    for actor in started:
        ray.kill(actor)


def test_a_rollout_is_scored_as_its_text_is(actors: list[Any], export_dir: Path) -> None:
    """Policy and reward model share a tokenizer: ids travel where they are those of the text."""
    import ray

    assert ray.get(actors[0].ready.remote()) == "token ids"
    rollouts = dict(sample(actors, PROMPTS, SAMPLING))
    assert sorted(rollouts) == [0, 1, 2]
    scorer = RewardScorer.from_pretrained(export_dir, "cpu")
    for index, group in rollouts.items():
        assert group.prompt == PROMPTS[index]
        assert group.prompt_ids == scorer.renderer.prompt_ids(PROMPTS[index])
        assert len(group.completions) == len(group.completion_ids) == 3
        assert set(group.finish_reasons) <= {"stop", "length"}
        for ids, log_probs in zip(group.completion_ids, group.log_probs, strict=True):
            assert 1 <= len(ids) <= 12
            assert len(log_probs) == len(ids)
            assert all(math.isfinite(value) and value <= 0 for value in log_probs)
        [offline] = scorer.score([Group(PROMPTS[index], group.completions)])
        assert group.scores is not None
        assert group.scores.rewards == pytest.approx(offline.rewards, abs=1e-5)
        assert group.scores.model_version == offline.model_version


def test_the_same_seed_samples_the_same(actors: list[Any]) -> None:
    first, again = (dict(sample(actors, PROMPTS, SAMPLING)) for _ in range(2))
    other = dict(sample(actors, PROMPTS, Sampling(num_completions=3, max_tokens=12, seed=99)))
    assert [first[i].completion_ids for i in range(3)] == [
        again[i].completion_ids for i in range(3)
    ]
    assert [first[i].completion_ids for i in range(3)] != [
        other[i].completion_ids for i in range(3)
    ]
    ids = first[0].completion_ids
    assert ids[0] != ids[1]


def test_a_crowd_of_prompts_is_sampled(actors: list[Any]) -> None:
    """More prompt tokens at once than vLLM reads in a step, all with seeds of their own."""
    prompts = [f"{number} " + "and a pear " * 25 for number in range(150)]
    rollouts = dict(sample(actors, prompts, Sampling(num_completions=2, max_tokens=4)))
    assert len(rollouts) == 150
    assert all(group.error is None and len(group.completions) == 2 for group in rollouts.values())
    tokens = sum(len(group.prompt_ids) for group in rollouts.values())
    assert tokens > 8192


def test_a_prompt_that_leaves_no_room_harms_no_other(actors: list[Any]) -> None:
    rollouts = dict(sample(actors, ["word " * 200, "Hi."], SAMPLING))
    assert rollouts[0].error is not None
    assert "the policy takes 128" in rollouts[0].error
    assert rollouts[0].completions == []
    assert rollouts[0].scores is None
    assert rollouts[1].error is None
    assert len(rollouts[1].completions) == 3
    assert rollouts[1].scores is not None


def test_log_probabilities_are_of_what_was_sampled_from(actors: list[Any]) -> None:
    """Near temperature 0 the sampled token is almost certain; at 1 this policy knows nothing."""
    cold = Sampling(num_completions=1, max_tokens=12, temperature=0.01)
    warm = Sampling(num_completions=1, max_tokens=12, temperature=1.0)
    means = []
    for sampling in (cold, warm):
        [(_, group)] = sample(actors, ["Hi."], sampling)
        means.append(sum(group.log_probs[0]) / len(group.log_probs[0]))
    assert means[0] > -1.0
    assert means[1] < -3.0


def test_other_tokenizers_travel_as_text(
    nursery: Nursery, service: str, tmp_path: Path, export_dir: Path, actors: list[Any]
) -> None:
    """A policy with a vocabulary of its own: its completions are rendered by the reward model.

    Runs as the command does, so the command is tested with it.
    """
    import ray

    from trainer.init_model import init_model

    ray.kill(actors.pop())  # two engines would not fit beside each other on two cores
    corpus = ["Something else entirely, so that the merges differ.", "0123456789"] * 20
    policy = init_model(
        tmp_path / "policy", corpus, vocab_size=300, hidden_size=32, num_layers=1, num_heads=2,
        num_kv_heads=1, head_dim=32, intermediate_size=32, max_position_embeddings=128,
    )  # fmt: skip
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "rollouts.jsonl"
    asked = [*PROMPTS, "word " * 200]
    prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in asked))
    address = ray.get_runtime_context().gcs_address
    command = [nursery.python, "-m", "rayward", "rollout", str(policy), str(prompts), str(output)]
    command += ["--scorer", service, "--ray-address", address, "--num-completions", "2"]
    done = subprocess.run(
        [*command, "--max-tokens", "8"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "completions travel as: text" in done.stdout
    assert "2 of 8 have no reward:\n  2 x not sampled: the prompt has" in done.stderr
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == asked
    assert "the policy takes 128" in rows.pop()["error"]
    scorer = RewardScorer.from_pretrained(export_dir, "cpu")
    for row in rows:
        [offline] = scorer.score([Group(row["prompt"], row["completions"])])
        assert row["rewards"] == pytest.approx(offline.rewards, abs=1e-5)


def test_a_policy_that_is_not_there_is_refused(
    ray_cluster: None, tmp_path: Path, base_model: Path
) -> None:
    with pytest.raises(ValueError, match="no policy to sample from"):
        start_rollout_actors(VllmSettings(str(tmp_path)), 1)
    with pytest.raises(ValueError, match="too small"):
        start_rollout_actors(VllmSettings(str(base_model)), 1000)
