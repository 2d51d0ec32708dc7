"""Evaluation of a directory, from pairs and from rankings, by the function and by the command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from data_files import prepared
from evaluation_files import (
    TOO_LONG,
    add,
    assert_same,
    write_evaluated_pairs,
    write_rankings,
)
from trainer_runs import write_pairs

import rayward
from reward_actor import Group, RewardScorer
from trainer.config.data import Columns
from trainer.evaluation import metrics
from trainer.evaluation.evaluate import evaluate_model, scoring


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_evaluated_pairs(tmp_path_factory.mktemp("eval"))


@pytest.fixture(scope="module")
def rankings(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_rankings(tmp_path_factory.mktemp("eval"))


def test_a_directory_is_evaluated(export_dir: Path, data: str) -> None:
    result = evaluate_model(str(export_dir), data, device="cpu", max_batch_tokens=64)
    assert (result["num_pairs"], result["num_dropped"]) == (30, 2)
    assert 0 <= result["accuracy_low"] <= result["accuracy"] <= result["accuracy_high"] <= 1
    assert result["model_version"].startswith("sha256:")
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    larger = evaluate_model(str(export_dir), data, device="cpu")
    assert larger["mean_reward"] == pytest.approx(result["mean_reward"], abs=1e-5)


def test_a_ranking_is_all_its_pairs(export_dir: Path, rankings: str) -> None:
    result = evaluate_model(
        str(export_dir), rankings, columns=Columns(subset_column="topic"), device="cpu"
    )
    assert (result["num_pairs"], result["num_ties"], result["num_dropped"]) == (10, 2, 1)
    ordered = [
        ("Name fruits.", ["Apples and pears.", "Apples.", "A pear, please.", "None."]),
        ("Name tools.", ["A pan.", "An egg.", "No."]),
        ([{"role": "user", "content": "Hi"}], ["Hey", "No"]),
        ("Name tools.", ["A pan.", "A knife."]),
    ]
    scorer = RewardScorer.from_pretrained(export_dir, device="cpu")
    groups = [Group(prompt, completions) for prompt, completions in ordered]
    scores = scorer.score([*groups, Group(prompt_ids=[5, 9], completion_ids=[[7, 8, 2], [8, 2]])])
    fruit, tools, hi, _, ids = (np.array(score.rewards, dtype=float) for score in scores)
    margins = [fruit[0] - fruit[[1, 2, 3]], fruit[[1, 2]] - fruit[3]]
    tool_margins = np.array([tools[0] - tools[1], tools[0] - tools[2], tools[1] - tools[2]])
    every = np.concatenate([*margins, tool_margins, [hi[0] - hi[1], ids[0] - ids[1]]])
    assert result["reward_margin"] == pytest.approx(every.mean(), abs=1e-5)
    assert result["accuracy"] == pytest.approx((every > 0).mean())
    assert list(result["subsets"]) == ["fruit", "tools"]
    assert result["subsets"]["tools"]["num_pairs"] == 3
    assert result["subsets"]["tools"]["accuracy"] == pytest.approx((tool_margins > 0).mean())
    tokens = [n for score in scores for n in score.num_tokens]
    rewards = [r for score in scores for r in score.rewards]
    assert result["mean_reward"] == pytest.approx(np.mean(rewards), abs=1e-5)
    assert result["length_correlation"] == pytest.approx(
        np.corrcoef(rewards, tokens)[0, 1], abs=1e-4
    )


def test_rewards_are_those_of_score_and_raw_scores_have_their_own_names(
    seeds: list[Path], data: str, tmp_path: Path
) -> None:
    """By a contract whose mean is 0.5 and whose standard deviation is 2."""
    result = evaluate_model(str(seeds[1]), data, device="cpu")
    scored = tmp_path / "scored.jsonl"
    assert rayward.main(["score", str(seeds[1]), data, str(scored), "--device", "cpu"]) == 0
    rows = [json.loads(line) for line in scored.read_text().splitlines()][:30]
    rewards, raw_scores = (
        np.array([row[name] for row in rows]) for name in ("rewards", "raw_scores")
    )
    margins, raw_margins = (of[:, 0] - of[:, 1] for of in (rewards, raw_scores))
    assert result["reward_margin"] == pytest.approx(margins.mean(), abs=1e-5)
    assert result["mean_reward"] == pytest.approx(rewards.mean(), abs=1e-5)
    assert result["raw_margin"] == pytest.approx(2 * margins.mean(), abs=2e-5)
    assert result["mean_raw_score"] == pytest.approx(raw_scores.mean(), abs=1e-5)
    assert result["log_loss"] == pytest.approx(np.logaddexp(0, -raw_margins).mean(), abs=1e-5)


def test_only_so_many_rows_are_read(export_dir: Path, data: str) -> None:
    assert evaluate_model(str(export_dir), data, max_pairs=4, device="cpu")["num_pairs"] == 4


def test_the_numbers_are_those_of_a_trainings_end(
    export_dir: Path, base_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same comparisons, by the same rules: what a training holds out of its data.eval."""
    rows = [
        {"prompt": f"Name {i}.", "better": "An apple. " * (i % 3 + 1), "worse": f"No {i}."}
        for i in range(12)
    ]
    again = {**rows[0], "kind": "hard"}  # the same pair in a subset, where it counts once
    file = add(
        tmp_path / "eval.jsonl", *rows, rows[0], again, again, {**rows[1], "better": TOO_LONG}
    )
    columns = {"chosen_column": "better", "rejected_column": "worse", "subset_column": "kind"}
    heldout = prepared(
        base_model,
        tmp_path / "out",
        str(write_pairs(tmp_path / "train.jsonl")),
        data__eval=json.dumps({file: columns}),
        data__over_long="truncate_left",
    ).heldout
    assert len(heldout) == 14
    scorer = RewardScorer.from_pretrained(export_dir, device="cpu")
    ids = [heldout.sequence(i) for i in range(heldout.num_sequences)]
    (scores,) = scorer.score([Group(prompt_ids=[], completion_ids=ids)])
    expected = metrics.evaluate(
        heldout, *(np.array(of, dtype=float) for of in (scores.raw_scores, scores.rewards))
    ).as_dict()
    command = ["eval", str(export_dir), file, "--json", "--device", "cpu"]
    for name, value in columns.items():
        command += ["--" + name.replace("_", "-"), value]
    assert rayward.main([*command, "--over-long", "truncate_left", "--deduplicate"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert_same({key: result[key] for key in expected}, expected)
    assert result["num_dropped"] == 2
    assert rayward.main(command) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["num_pairs"], result["num_dropped"]) == (15, 1)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dtype", "float32"], "--dtype: these are for loading a model, and the service at http"),
        (["--trust-remote-code"], "--trust-remote-code: these are for loading a model"),
        (["--rewardbench", "2", "--device", "cpu"], "--device: these are for loading a model"),
        (["--over-long", "truncate_left"], "over_long truncate_left and deduplicate need the"),
        (["--deduplicate"], "over_long truncate_left and deduplicate need the model's directory"),
        (["--rewardbench", "1", "--chosen-column", "a", "--deduplicate"],
         "--chosen-column, --deduplicate: RewardBench has its own columns and rules"),
    ],
)  # fmt: skip
def test_an_option_that_could_do_nothing_is_refused(
    flags: list[str], message: str, data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert rayward.main(["eval", "http://127.0.0.1:1", data, *flags]) == 2
    assert message in capsys.readouterr().err


def test_a_service_is_not_told_how_to_load_its_model(
    data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = "http://127.0.0.1:1"
    with pytest.raises(ValueError, match="has loaded its model already: dtype cannot be chosen"):
        evaluate_model(url, data, dtype="float32")
    with pytest.raises(ValueError, match="device cannot be chosen"), scoring(url, device="cpu"):
        pass
    output = tmp_path / "out.jsonl"
    assert rayward.main(["score", url, data, str(output), "--attention", "padded"]) == 2
    assert "--attention: these are for loading a model" in capsys.readouterr().err


def test_the_command_prints_json_or_a_table(
    export_dir: Path, rankings: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["eval", str(export_dir), rankings, "--subset-column", "topic", "--device", "cpu"]
    assert rayward.main([*command, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["num_pairs"] == 10
    assert rayward.main(command) == 0
    text = " ".join(capsys.readouterr().out.replace("\u2502", " ").split())
    assert f"accuracy {100 * result['accuracy']:.1f} % 95 %: " in text
    assert "not above chance: the interval includes 50 %" in text
    assert "10 of 4 prompts; 2 ties and 1 dropped rows are not counted" in text
    assert f"log loss {result['log_loss']:.4f} of raw scores; guessing 0.6931, lower is" in text
    assert f"reward margin {result['reward_margin']:+.3f} mean of chosen - rejected" in text
    assert "Subsets" in text
    assert text.index("fruit 5 ") < text.index("tools 3 ")
    assert not set(result) & set(text.split()) - {"accuracy", "data", "model"}, "no names of JSON"


def test_bad_data_and_bad_models_are_named(export_dir: Path, base_model: Path, data: str) -> None:
    with pytest.raises(ValueError, match=r"nowhere.jsonl does not exist"):
        evaluate_model(str(export_dir), "nowhere.jsonl")
    with pytest.raises(ValueError, match="no trained reward head"):
        evaluate_model(str(base_model), data)


def test_rankings_without_scores_and_few_prompts_are_told(
    export_dir: Path, rankings: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["eval", str(export_dir), rankings, "--device", "cpu"]
    assert rayward.main(command) == 0
    errors = capsys.readouterr().err
    assert (
        "warning: " + rankings + ": 2 of 6 rows are rankings without scores, whose compl" in errors
    )
    assert "are about 4 prompts: with fewer than 100 an accuracy is a rough guess" in errors
    assert rayward.main([*command, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["warnings"]) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--scores-column", "score"],
         "scores_column: no row of {data} has a column 'score'; did you mean 'scores'?"),
        (["--scores-column", "topic"],
         "3 of 6 rows cannot be used:\n  {data}:1: 'topic' is text, not a list of numbers"),
        (["--margin-column", "strength"],
         "margin_column: no row of {data} has a column 'strength'; known keys: "),
        (["--subset-column", "topics"],
         "subset_column: no row of {data} has a column 'topics'; did you mean 'topic'?"),
    ],
)  # fmt: skip
def test_a_named_column_that_no_row_has_is_refused(
    options: list[str],
    message: str,
    export_dir: Path,
    rankings: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert rayward.main(["eval", str(export_dir), rankings, "--device", "cpu", *options]) == 2
    assert message.format(data=rankings) in capsys.readouterr().err


def test_prompts_that_are_guessed_are_told(export_dir: Path, tmp_path: Path) -> None:
    file = add(tmp_path / "ids.jsonl", {"chosen_ids": [5, 9, 2], "rejected_ids": [5, 8, 2]})
    guessed, few = evaluate_model(str(export_dir), file, device="cpu")["warnings"]
    assert guessed.startswith(f"{file}: 1 of 1 rows have no prompt of their own; what their compl")
    assert "are about 1 prompt: with fewer than 100" in few
