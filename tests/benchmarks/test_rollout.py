"""The rollout benchmark: its policies, its simulated engine, its figures, the flags it refuses."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.rollout import __main__, report
from benchmarks.rollout.models import make_policy, prompts, with_other_template, word_ids
from benchmarks.rollout.simulated import SimulatedEngine, SimulatedSettings
from benchmarks.serving.report import summarize
from reward_actor.groups import Group
from reward_actor.model.inferred import contract_for
from reward_actor.model.tokenizer import tokenizer_fingerprint
from reward_actor.render import Renderer
from reward_actor.rollout import RolloutGroup, Sampling
from reward_actor.rollout.policy import Policy, group_to_score


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_policy("tiny", tmp_path_factory.mktemp("policy") / "policy")


def engine(policy: str, **settings: Any) -> tuple[Policy, SimulatedEngine]:
    loaded = Policy.load(policy)
    words = tuple(word_ids(policy, 64))
    return loaded, SimulatedEngine(
        SimulatedSettings(policy, words=words, **settings), loaded.prompts.tokenizer
    )


def test_what_a_simulated_engine_samples_travels_as_token_ids(policy: str) -> None:
    """Otherwise a benchmark of token ids would measure text."""
    loaded, simulated = engine(policy)
    renderer = Renderer(
        loaded.prompts.tokenizer,
        contract_for(loaded.prompts.tokenizer, loaded.config, format="chat"),
    )
    for prompt in prompts(5):
        prompt_ids = loaded.prompt_ids(Group(prompt))
        turns = asyncio.run(simulated.sample(prompt_ids, Sampling(3), 7, 40))
        again = asyncio.run(simulated.sample(prompt_ids, Sampling(3), 7, 40))
        assert turns == again, "a seed decides"
        assert all(10 <= len(turn.completion_ids) <= 40 for turn in turns)
        rollout = RolloutGroup(prompt, prompt_ids)
        rollout.end_with(turns)
        assert group_to_score(rollout, renderer).prompt_ids == prompt_ids


def test_a_simulated_engine_takes_as_long_as_its_steps(policy: str) -> None:
    took = {}
    for max_sequences in (1, 12):
        _, simulated = engine(policy, step_s=0.005, max_sequences=max_sequences)
        begin = time.perf_counter()
        turns = asyncio.run(simulated.sample([5], Sampling(12), 0, 32))
        took[max_sequences] = time.perf_counter() - begin
        lengths = [len(turn.completion_ids) for turn in turns]
        steps = sum(lengths) if max_sequences == 1 else max(lengths)
        assert took[max_sequences] >= 0.005 * steps
    assert took[12] < took[1] / 2, "together, not one after the other"


def test_another_template_renders_the_same_and_is_another(policy: str, tmp_path: Path) -> None:
    one, other = (
        Policy.load(path) for path in (policy, with_other_template(policy, tmp_path / "other"))
    )
    for prompt in prompts(3):
        assert one.prompt_ids(Group(prompt)) == other.prompt_ids(Group(prompt))
    fingerprints = {
        tokenizer_fingerprint(each.prompts.tokenizer, each.prompts.format) for each in (one, other)
    }
    assert len(fingerprints) == 2


def test_ratios_are_of_one_round() -> None:
    """A round that is slow as a whole moves no ratio."""
    runs = {
        "overlap": {
            "overlapped": [{"seconds": 10.0}, {"seconds": 30.0}],
            "one after the other": [
                {"seconds": 15.0, "sampling_s": 10.0, "scoring_s": 5.0},
                {"seconds": 45.0, "sampling_s": 15.0, "scoring_s": 30.0},
            ],
        },
        "actors": {
            "1": [{"prompts_per_s": 10.0}, {"prompts_per_s": 1.0}],
            "4": [{"prompts_per_s": 30.0}, {"prompts_per_s": 3.0}],
        },
    }
    figures = summarize(runs)
    found = {row["what"]: row for row in report.targets(figures)}
    assert found["overlap: time over the longer phase's"]["rounds"] == [1.0, 1.0]
    assert found["overlap: time over the longer phase's"]["is_met"] is True
    assert found["overlap: time over both phases'"]["value"] == pytest.approx(2 / 3)
    assert found["overlap: time over both phases'"]["goal"] is None
    assert found["4 actors: share of linear"]["value"] == 0.75
    assert found["4 actors: share of linear"]["is_met"] is False
    assert "actors, 4 (164%)" in report.noisy(figures)
    table = report.tables(figures, report.targets(figures))
    assert "| 4 actors: share of linear | 0.75 | at least 0.9 | no |" in table
    json.dumps(figures)


def test_an_unknown_workload_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        __main__.main(["--workload", "nothing"])
    assert "invalid choice: 'nothing'" in capsys.readouterr().err
