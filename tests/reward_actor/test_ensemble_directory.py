"""A directory that names an ensemble: made by the command, read by the scorer, or refused."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

import rayward
from reward_actor import Group, RewardScorer
from reward_actor.model.directory import CheckpointError
from reward_actor.model.ensemble import ENSEMBLE_FILE, Ensemble

GROUPS = [
    Group("Name two fruits.", ["An apple and a pear.", "A hammer.", ""]),
    Group(prompt_ids=[5, 6, 7], completion_ids=[[8], [9, 10]]),
]


def test_the_command_makes_a_directory_that_scores(
    seeds: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "made" / "ensemble"
    members = [str(path) for path in seeds]
    command = ["ensemble", str(directory), *members, "--combine", "mean_minus_std", "--k", "0.5"]
    assert rayward.main(command) == 0
    assert "mean_minus_std of 2 members, k 0.5: seed-0/export" in capsys.readouterr().out
    assert json.loads((directory / ENSEMBLE_FILE).read_text()) == {
        "members": members,
        "combine": "mean_minus_std",
        "k": 0.5,
    }
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "Name two fruits.", "completions": ["An apple.", "No."]}\n')
    score = ["score", str(directory), str(source), str(output), "--device", "cpu"]
    assert rayward.main([*score, "--attention", "padded"]) == 0
    row = json.loads(output.read_text())
    listed = RewardScorer.from_pretrained(seeds, "cpu", combine="mean_minus_std", k=0.5)
    [expected] = listed.score([Group("Name two fruits.", ["An apple.", "No."])])
    assert row["rewards"] == pytest.approx(expected.rewards, abs=1e-5)
    assert row["spread"] == pytest.approx(expected.spread, abs=1e-5)
    assert expected.named_rewards is not None
    assert list(row["named_rewards"]) == list(expected.named_rewards)
    for name, rewards in expected.named_rewards.items():
        assert row["named_rewards"][name] == pytest.approx(rewards, abs=1e-5)
    assert row["model_version"] == listed.model_version
    assert rayward.main(command) == 2
    assert "holds ensemble.json already" in capsys.readouterr().err


def test_a_relative_member_stays_relative(
    seeds: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was moved together is found together."""
    before = tmp_path / "before"
    for path in seeds:
        shutil.copytree(path, before / "models" / path.parent.name)
    monkeypatch.chdir(before)
    command = ["ensemble", "ensembles/both", "models/seed-0", "models/seed-1"]
    assert rayward.main(command) == 0
    after = tmp_path / "after"
    os.rename(before, after)
    both = RewardScorer.from_pretrained(after / "ensembles" / "both", "cpu")
    assert both.readout.names == ["seed-0", "seed-1"]
    assert both.readout.combine == "mean"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"members": ["{0}", "{0}/../nowhere"]}, "nowhere is not a directory"),
        ({"members": ["{0}"]}, "ensemble of 1; it needs at least two"),
        ({"members": ["{0}", "{0}/."]}, "named twice"),
        ({"members": ["{0}", "."]}, "is an ensemble itself"),
        ({"members": ["{0}", 7]}, "members must be a list of directories"),
        ({"members": "ab"}, "members must be a list of directories"),
        ({"members": ["{0}", "{1}"], "combine": "median"}, "combine is 'median'"),
        ({"members": ["{0}", "{1}"], "combine": ["min"]}, r"combine is \['min'\]"),
        ({"members": ["{0}", "{1}"], "k": "2"}, "k is '2'"),
        ({"members": ["{0}", "{1}"], "weights": [1, 2]}, "unknown key 'weights'"),
        ({"members": ["{0}", ".."]}, "holds no config.json"),
        ([], "does not hold a JSON object"),
    ],
)
def test_an_ensemble_file_that_cannot_be_is_refused(
    seeds: list[Path], tmp_path: Path, content: Any, message: str
) -> None:
    directory = tmp_path / "ensemble"
    directory.mkdir()
    text = json.dumps(content)
    for index, path in enumerate(seeds):
        text = text.replace(f"{{{index}}}", str(path))
    (directory / ENSEMBLE_FILE).write_text(text)
    with pytest.raises(CheckpointError, match=message):
        RewardScorer.from_pretrained(directory, "cpu")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (["{0}"], "it needs at least two members"),
        (["{0}", "/nowhere"], "/nowhere is not a directory"),
        (["{0}", "{base}"], "no trained reward head"),
        (["{0}", "{text}"], "its format differs"),
    ],
)
def test_the_command_says_what_cannot_be_an_ensemble(
    seeds: list[Path],
    base_model: Path,
    text_model: Path,
    tmp_path: Path,
    members: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    filled = [member.format(seeds[0], base=base_model, text=text_model) for member in members]
    assert rayward.main(["ensemble", str(tmp_path / "made"), *filled]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert not (tmp_path / "made").exists()


def test_a_rule_goes_with_a_list_only(seeds: list[Path]) -> None:
    with pytest.raises(ValueError, match="combine and k go with a list of directories"):
        RewardScorer.from_pretrained(seeds[0], "cpu", combine="min")
    with pytest.raises(ValueError, match="combine is 'worst'"):
        RewardScorer.from_pretrained(seeds, "cpu", combine="worst")  # type: ignore[arg-type]
    assert Ensemble(tuple(seeds)).combine == "mean"
