"""Several heads or several models as one reward, from their directories to the scores."""

from __future__ import annotations

import json
import math
import shutil
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exports import make_export
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from reward_actor import Group, RewardScorer
from reward_actor.contract import ContractError, HeldOut, ScoringContract
from reward_actor.convert import convert
from reward_actor.engine.probe import synthetic_groups
from reward_actor.groups import GroupScores
from reward_actor.model.directory import CheckpointError
from reward_actor.model.manifest import write_manifest

GROUPS = [
    Group("Name two fruits.", ["An apple and a pear.", "A hammer.", ""]),
    Group(prompt_ids=[5, 6, 7], completion_ids=[[8], [9, 10]]),
]
HEADS = ["helpful", "harmless", "honest"]


@pytest.fixture(scope="module")
def three_heads(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_export(
        base_model,
        tmp_path_factory.mktemp("heads") / "three",
        seed=2,
        heads=HEADS,
        combine="mean_minus_std",
        combine_k=0.5,
        mean=0.25,
        std=1.5,
    )


def by_hand(rewards: list[float], combine: str, k: float) -> float:
    if combine == "min":
        return min(rewards)
    penalty = k * statistics.pstdev(rewards) if combine == "mean_minus_std" else 0.0
    return statistics.fmean(rewards) - penalty


def of_samples(scores: GroupScores) -> list[list[Any]]:
    """The members' rewards of each sample."""
    assert scores.named_rewards is not None
    return [list(of_sample) for of_sample in zip(*scores.named_rewards.values(), strict=True)]


@pytest.mark.parametrize(
    ("combine", "k"), [("mean", 1.0), ("min", 1.0), ("mean_minus_std", 1.0), ("mean_minus_std", 2)]
)
def test_an_ensemble_is_the_rule_over_its_members(
    seeds: list[Path], combine: Any, k: float
) -> None:
    both = RewardScorer.from_pretrained(seeds, "cpu", combine=combine, k=k)
    assert both.readout.names == ["seed-0/export", "seed-1/export"]
    alone = [RewardScorer.from_pretrained(path, "cpu") for path in seeds]
    own = [scorer.score(GROUPS) for scorer in alone]
    for index, scores in enumerate(both.score(GROUPS)):
        members = of_samples(scores)
        assert list(scores.named_rewards or ()) == both.readout.names
        assert scores.spread is not None
        assert scores.model_version == both.model_version
        for sample, reward in enumerate(scores.rewards):
            rewards = [member[index].rewards[sample] for member in own]
            raw = [member[index].raw_scores[sample] for member in own]
            assert members[sample] == pytest.approx(rewards, abs=1e-5)
            assert reward == pytest.approx(by_hand(rewards, combine, k), abs=2e-5)
            assert scores.raw_scores[sample] == pytest.approx(by_hand(raw, combine, k), abs=2e-5)
            assert scores.spread[sample] == pytest.approx(statistics.pstdev(rewards), abs=1e-5)
    assert own[0][0].named_rewards is None
    assert own[0][0].spread is None


def test_every_call_gives_the_same_rewards(seeds: list[Path]) -> None:
    scorer = RewardScorer.from_pretrained(seeds, "cpu", combine="min")
    sequences = [[5, 6, 7, 8], [5, 6, 7, 9, 10], [3]]
    rewards = scorer.score_ids(sequences)
    assert rewards.dtype == np.float32
    per_token = scorer.token_rewards(sequences)
    assert [len(row) for row in per_token] == [4, 5, 1]
    assert [float(row[-1]) for row in per_token] == pytest.approx(rewards.tolist(), abs=1e-5)
    for sequence, row in zip(sequences, per_token, strict=True):
        begun = [scorer.score_ids([sequence[: end + 1]])[0] for end in range(len(sequence))]
        assert row.tolist() == pytest.approx([float(reward) for reward in begun], abs=1e-5)
    [with_tokens] = scorer.score(GROUPS[1:], token_rewards=True)
    assert with_tokens.rewards == pytest.approx(rewards[:2].tolist(), abs=1e-5)
    assert with_tokens.token_rewards is not None
    assert with_tokens.token_rewards[0] == pytest.approx(per_token[0].tolist(), abs=1e-5)
    assert with_tokens.named_rewards is not None


def test_three_heads_of_one_model(three_heads: Path) -> None:
    """Export, load and score against what plain `transformers` makes of the same directory."""
    plain = AutoModelForSequenceClassification.from_pretrained(three_heads, dtype=torch.float32)
    assert plain.config.id2label == dict(enumerate(HEADS))
    scorer = RewardScorer.from_pretrained(three_heads, "cpu")
    assert scorer.readout.names == HEADS
    [scores] = scorer.score(GROUPS[:1])
    assert list(scores.named_rewards or ()) == HEADS
    members = of_samples(scores)
    for index, completion in enumerate(GROUPS[0].completions):
        ids = scorer.renderer.render("Name two fruits.", completion)
        with torch.inference_mode():
            logits = plain(torch.tensor([ids])).logits[0].tolist()
        rewards = [(logit - 0.25) / 1.5 for logit in logits]
        assert members[index] == pytest.approx(rewards, abs=1e-5)
        expected = by_hand(rewards, "mean_minus_std", 0.5)
        assert scores.rewards[index] == pytest.approx(expected, abs=2e-5)
    golden = scorer.contract.golden
    expected_raw = scorer.readout.read(
        scorer.raw_scores([sample.input_ids for sample in golden.samples])
    ).raw_scores
    assert golden.raw_scores["float32"] == pytest.approx(expected_raw.tolist(), abs=1e-5)
    half = RewardScorer.from_pretrained(three_heads, "cpu", "bfloat16")  # replays them, too
    assert half.score(GROUPS[:1])[0].named_rewards is not None


def test_several_heads_survive_conversion(three_heads: Path, tmp_path: Path) -> None:
    convert(three_heads, tmp_path / "converted")
    before, after = (
        RewardScorer.from_pretrained(path, "cpu").score(GROUPS)
        for path in (three_heads, tmp_path / "converted")
    )
    for ours, theirs in zip(after, before, strict=True):
        assert ours.rewards == pytest.approx(theirs.rewards, abs=1e-6)
        ours_named, theirs_named = (np.array(of_samples(each)) for each in (ours, theirs))
        assert ours_named == pytest.approx(theirs_named, abs=1e-6)


def test_a_model_with_several_heads_brings_all_of_them(
    seeds: list[Path], three_heads: Path
) -> None:
    mixed = RewardScorer.from_pretrained([seeds[0], three_heads], "cpu", combine="min")
    assert mixed.readout.names == ["export", *(f"three/{head}" for head in HEADS)]
    alone = of_samples(RewardScorer.from_pretrained(three_heads, "cpu").score(GROUPS)[0])
    members = of_samples(mixed.score(GROUPS)[0])
    assert members[0][1:] == pytest.approx(alone[0], abs=1e-5)


def test_the_version_is_that_of_the_members_and_the_rule(seeds: list[Path]) -> None:
    def version(paths: list[Path], **rule: Any) -> str:
        return RewardScorer.from_pretrained(paths, "cpu", **rule).model_version

    loaded = RewardScorer.from_pretrained(seeds, "cpu").members
    versions = [
        RewardScorer(loaded, combine=combine, k=k).model_version
        for combine, k in (("mean", 1.0), ("min", 1.0), ("mean_minus_std", 1), ("mean", 2.0))
    ]
    versions += [RewardScorer(loaded[::-1]).model_version, loaded[0].version, loaded[1].version]
    assert len(set(versions)) == len(versions)
    assert all(version.startswith("sha256:") for version in versions)
    assert version(seeds, combine="min") == versions[1]
    assert RewardScorer(loaded[:1]).model_version == loaded[0].version


def test_held_out_scores_of_a_member_are_not_those_of_the_ensemble(seeds: list[Path]) -> None:
    held_out = HeldOut([float(n) for n in range(101)], 0.1, 500)
    members = [
        replace(member, contract=replace(member.contract, held_out=held_out))
        for member in RewardScorer.from_pretrained(seeds, "cpu").members
    ]
    assert RewardScorer(members[:1]).contract.held_out == held_out
    assert RewardScorer(members).contract.held_out is None


@pytest.mark.parametrize("attention", ["auto", "padded"])
def test_one_member_with_nan_is_the_error_of_that_sample(
    seeds: list[Path], tmp_path: Path, attention: Any
) -> None:
    """The golden samples and the probe never meet the token whose embedding is broken."""
    broken = Path(shutil.copytree(seeds[1], tmp_path / "broken"))
    contract = ScoringContract.load(broken)
    assert contract is not None
    weights = load_file(broken / "model.safetensors")
    config = AutoModelForSequenceClassification.from_pretrained(broken).config
    met = [*(sample.input_ids for sample in contract.golden.samples)]
    met += [list(row) for row in synthetic_groups(config, 512)] + [list(range(5, 30))]
    bad = next(i for i in range(400) if not any(i in row for row in met))
    weights["model.embed_tokens.weight"][bad] = math.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    write_manifest(broken)
    scorer = RewardScorer.from_pretrained(
        [seeds[0], broken], "cpu", attention=attention, cache_size=0
    )
    healthy = Group(prompt_ids=[5, 6], completion_ids=[[7], [8, 9]])
    sick = Group(prompt_ids=[5, 6], completion_ids=[[7], [bad, 9], [8, 9]])
    [expected] = scorer.score([healthy])
    for token_rewards in (False, True):
        first, scores, last = scorer.score([healthy, sick, healthy], token_rewards)
        for result in (first, last):
            assert result.rewards == pytest.approx(expected.rewards, abs=1e-5)
            assert result.errors == [None, None]
        assert [error and error.type for error in scores.errors] == [
            None,
            "non_finite_reward",
            None,
        ]
        assert scores.errors[1] is not None
        assert "broken's reward" in scores.errors[1].message
        assert scores.rewards[::2] == pytest.approx(expected.rewards, abs=1e-5)
        assert scores.spread is not None
        assert [scores.rewards[1], scores.spread[1]] == [None] * 2
        assert set(of_samples(scores)[1]) == {None}
    with pytest.raises(ValueError, match="sequence 1: the model's reward is not finite"):
        scorer.score_ids([[5], [bad]])
    with pytest.raises(ValueError, match="sequence 1: the model's reward is not finite"):
        scorer.token_rewards([[5], [bad]])


def test_the_tightest_limit_holds_for_all(seeds: list[Path]) -> None:
    loaded = RewardScorer.from_pretrained(seeds, "cpu").members
    short = replace(loaded[1], contract=replace(loaded[1].contract, max_length=9, vocab_size=300))
    scorer = RewardScorer([loaded[0], short])
    [scores] = scorer.score([Group(prompt_ids=[5], completion_ids=[[6] * 8, [6] * 9, [300]])])
    assert [error and error.type for error in scores.errors] == [
        None,
        "too_long",
        "token_out_of_vocabulary",
    ]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("chat_template", "{{ messages }}<|im_end|>", "its chat_template differs from that of"),
        ("turn_end", "", "its turn_end differs .*'' against '<|im_end|>'"),
        ("add_special_tokens", True, r"add_special_tokens differs .*\(True against False\)"),
        ("template_date", "2026-01-01", "template_date differs .*'2026-01-01' against None"),
        ("append_eos", True, "append_eos differs"),
        ("template_args", {"a": 1}, r"template_args differs .*\({'a': 1} against {}\)"),
    ],
)
def test_members_that_render_otherwise_are_refused(
    seeds: list[Path], field: str, value: Any, message: str
) -> None:
    loaded = RewardScorer.from_pretrained(seeds, "cpu").members
    other = replace(loaded[1], contract=replace(loaded[1].contract, **{field: value}))
    with pytest.raises(ValueError, match=message) as refused:
        RewardScorer([loaded[0], other])
    assert f"member {seeds[1]}" in str(refused.value)


def test_another_tokenizer_or_format_is_refused(
    seeds: list[Path], text_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"text: its format differs .*'text' against 'chat'"):
        RewardScorer.from_pretrained([seeds[0], text_model], "cpu")
    other = Path(shutil.copytree(seeds[1], tmp_path / "other"))
    rules = json.loads((other / "tokenizer.json").read_text())
    rules["model"]["merges"] = rules["model"]["merges"][:-20]
    (other / "tokenizer.json").write_text(json.dumps(rules))
    write_manifest(other)
    with pytest.raises(ValueError, match="other: its tokenizer differs"):
        RewardScorer.from_pretrained([seeds[0], other], "cpu")


def test_every_member_replays_its_own_golden_samples(seeds: list[Path], tmp_path: Path) -> None:
    bad = Path(shutil.copytree(seeds[1], tmp_path / "bad"))
    contract = json.loads((bad / "scoring_contract.json").read_text())
    contract["golden"]["raw_scores"]["float32"][0] += 0.1
    (bad / "scoring_contract.json").write_text(json.dumps(contract))
    write_manifest(bad)
    with pytest.raises(ContractError, match="golden sample 0 scores"):
        RewardScorer.from_pretrained([seeds[0], bad], "cpu")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"heads": []}, r"heads is \[\]"),
        ({"heads": ["a", "a"]}, "needs a name of its own"),
        ({"combine": "max"}, "combine is 'max'"),
        ({"combine_k": -0.5}, r"combine_k is -0\.5"),
    ],
)
def test_a_contract_with_heads_that_cannot_be_is_refused(
    three_heads: Path, fields: dict[str, Any], message: str
) -> None:
    contract = ScoringContract.load(three_heads)
    assert contract is not None
    assert contract.heads == HEADS
    with pytest.raises(ContractError, match=message):
        replace(contract, **fields)


def test_fewer_outputs_than_the_contract_names_are_refused(
    seeds: list[Path], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(seeds[0], tmp_path / "copy"))
    contract = ScoringContract.load(copy)
    assert contract is not None
    replace(contract, heads=["a", "b"]).save(copy)
    write_manifest(copy)
    with pytest.raises(CheckpointError, match=r"1 outputs but the contract names 2 \(a, b\)"):
        RewardScorer.from_pretrained(copy, "cpu")
