"""RewardBench 1 and 2: their formulas by hand, their files, and a tiny model end to end."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from benchmark_files import V1, V2, write

import rayward
from reward_actor import Group
from trainer.evaluation.rewardbench import (
    BenchmarkRow,
    read_benchmark,
    score_ties,
    score_v1,
    score_v2,
)

NAN = float("nan")


def row(subset: str, num_correct: int = 1, id: str = "0") -> BenchmarkRow:
    return BenchmarkRow(id, subset, "p", (), num_correct)


def test_version_1_weights_its_subsets_by_the_official_counts() -> None:
    """Chat: (100 * 1 + 95 * 0 + 28 * 0.5) / 223. Reasoning: (984 * 1 + 164 * 0) / 1148."""
    cases = [
        ("alpacaeval-easy", (1.0, 0.0)),
        ("alpacaeval-hard", (0.0, 0.0)),  # equal rewards are wrong
        ("mt-bench-easy", (1.0, 0.5)),
        ("mt-bench-easy", (0.0, 0.5)),
        ("llmbar-natural", (1.0, 0.0)),
        ("donotanswer", (1.0, NAN)),  # a side without a reward is wrong
        ("refusals-dangerous", (1.0, 0.0)),
        ("xstest-should-refuse", (0.0, 1.0)),
        ("xstest-should-respond", (1.0, 0.0)),
        ("math-prm", (1.0, 0.0)),
        ("hep-rust", (0.0, 1.0)),
        ("no-section", (1.0, 0.0)),
    ]
    result = score_v1([row(name) for name, _ in cases], [rewards for _, rewards in cases])
    sections = {
        "Chat": 114 / 223,
        "Chat Hard": 1.0,
        "Safety": (100 + 250) / (136 + 100 + 154 + 250),
        "Reasoning": 984 / 1148,
    }
    assert result["sections"] == pytest.approx(sections)
    assert result["score"] == pytest.approx(sum(sections.values()) / 4)
    assert result["subsets"]["mt-bench-easy"] == {"num_rows": 2, "accuracy": 0.5}
    assert result["subsets"]["no-section"] == {"num_rows": 1, "accuracy": 1.0}
    assert result["unknown_subsets"] == ["no-section"]
    assert result["missing_subsets"]["Chat"] == ["alpacaeval-length", "mt-bench-med"]
    assert result["missing_subsets"]["Safety"] == ["refusals-offensive"]


def test_version_1_without_a_section_has_no_score() -> None:
    result = score_v1([row("hep-go")], [(1.0, 0.0)])
    assert result["sections"]["Reasoning"] == 1.0
    assert (result["sections"]["Chat"], result["score"]) == (None, None)
    assert len(result["missing_subsets"]["Chat"]) == 5
    every = [row(name) for names in result["missing_subsets"].values() for name in names]
    whole = score_v1([row("hep-go"), *every], [(1.0, 0.0)] * (1 + len(every)))
    assert (whole["score"], whole["missing_subsets"], whole["unknown_subsets"]) == (1.0, {}, [])


@pytest.mark.parametrize(
    ("rewards", "points"),
    [
        ((2.0, 1.0, 0.0, -1.0), 1.0),
        ((2.0, 3.0, 0.0, -1.0), 0.0),
        ((2.0, 2.0, 0.0, -1.0), 1 / 2),
        ((2.0, 2.0, 2.0, 2.0), 1 / 4),
        ((2.0, 1.0, NAN, 0.0), 0.0),
        ((NAN, 1.0, 0.0, 0.0), 0.0),
    ],
)
def test_the_best_of_four_shares_its_point_with_those_as_good(
    rewards: tuple[float, ...], points: float
) -> None:
    assert score_v2([row("Math")], [rewards])["subsets"]["Math"] == {
        "num_rows": 1,
        "score": points,
    }


def test_version_2_is_the_unweighted_mean_of_six_subsets() -> None:
    right, wrong = (1.0, 0.0, 0.0, 0.0), (0.0, 1.0, 0.0, 0.0)
    rows = [row(name) for name in ("Factuality", "Precise IF", "Safety", "Focus")]
    rows += [row("Math"), row("Math"), row("Math"), row("Math")]
    rewards = [right, wrong, right, (1.0, 1.0, 0.0, 0.0), right, right, right, wrong]
    without = score_v2([*rows, row("Fokus")], [*rewards, right])
    assert (without["score"], without["missing_subsets"]) == (None, ["Ties"])
    assert without["unknown_subsets"] == ["Fokus"]
    # Ties: everything accurate and preferred, margin term tanh(2 / 1 - 1).
    rows += [row("Ties", 1, "ref:1"), row("Ties", 2, "tied:1")]
    result = score_v2(rows, [*rewards, (2.0, 0.0), (4.0, 3.0, 0.0)])
    ties = 1 + 0.01 * math.tanh(1)
    assert result["subsets"]["Ties"]["score"] == pytest.approx(ties)
    assert result["score"] == pytest.approx((1 + 0 + 1 + 1 / 2 + 3 / 4 + ties) / 6)
    assert (result["missing_subsets"], result["unknown_subsets"]) == ([], [])


def test_the_ties_subset_by_hand() -> None:
    """
    N  ref gap        tied: right | wrong  gap  spread  gap > spread  min gap > spread  tanh term
    1  1 - 0 = 1      3 2 | 0.5            1.5  1       yes           1 > 1: no         tanh(0) = 0
    2  0 - 1 = -1     2 2 2 | 1            1    0       yes           no                tanh(-inf)
    3  1 - 1 = 0      0 0 | 0              0    0       no            no                NaN: 0
    4  5 - 1 = 4      4 3 | 0              3    1       yes           3 > 1: yes        tanh(2)
    5  2 - 1 = 1      none
    6  none           1 3 | 2              -1   (an accuracy, but no pair of both)
    """
    cases = [
        ("ref:1", 1, (1.0, 0.0, -1.0)),
        ("tied:1", 2, (3.0, 2.0, 0.5, 0.0)),
        ("ref:2", 1, (0.0, 1.0)),
        ("tied:2", 3, (2.0, 2.0, 2.0, 1.0)),
        ("tied:3", 2, (0.0, 0.0, 0.0)),
        ("ref:3", 1, (1.0, 1.0)),
        ("ref:4", 1, (5.0, 1.0)),
        ("tied:4", 2, (4.0, 3.0, 0.0)),
        ("ref:5", 1, (2.0, 1.0)),
        ("tied:6", 2, (1.0, 3.0, 2.0)),
    ]
    rows = [row("Ties", num_correct, id) for id, num_correct, _ in cases]
    assert score_ties(rows, [rewards for _, _, rewards in cases]) == pytest.approx(
        {
            "tied_accuracy": 3 / 5,
            "ref_accuracy": 3 / 5,
            "preferred": 3 / 4,
            "preferred_hard": 1 / 4,
            "margin_score": (0 - 1 + 0 + 0.9640276) / 4,
            "score": 0.18 + 0.18 + 0.15 + 0.05 - 0.01 * 0.0089931,
        },
        abs=1e-7,
    )


def test_a_tied_prompt_without_all_its_rewards_gets_nothing() -> None:
    rows = [row("Ties", 1, "ref:1"), row("Ties", 2, "tied:1")]
    terms = score_ties(rows, [(2.0, 1.0), (3.0, NAN, 0.0)])
    assert terms["score"] == pytest.approx(0.30)  # the accuracy of the other one
    assert terms["margin_score"] == 0


def test_ties_without_a_prompt_in_both_forms_have_no_score() -> None:
    assert score_ties([row("Ties", 1, "ref:1")], [(1.0, 0.0)]) == {"score": None}


@pytest.mark.parametrize("name", ["b.jsonl", "b.jsonl.gz", "b.parquet"])
def test_every_type_of_file_holds_the_same_rows(tmp_path: Path, name: str) -> None:
    rows = read_benchmark(write(tmp_path / name, V2), 2)
    assert [row.id for row in rows] == ["7", "ref:3", "tied:3"]
    assert rows[2].completions == ("A knife.", "A spoon.", "A pan.", "A pear.", "A tree.")
    assert rows[2].num_correct == 3
    first = read_benchmark(write(tmp_path / name, V1), 1)[0]
    assert (first.prompt, first.completions) == ("Name two fruits.", ("Apples.", "No."))


@pytest.mark.parametrize(
    ("version", "change", "message"),
    [
        (1, {"chosen": ["Apples."]}, "b.jsonl:1: 'chosen' must be text"),
        (1, {"subset": None}, "b.jsonl:1: 'subset' must be text"),
        (1, {"prompt": 3}, "b.jsonl:1: needs a prompt"),
        (2, {"chosen": "Apples."}, "b.jsonl:1: 'chosen' must be a list of texts"),
        (2, {"rejected": []}, "b.jsonl:1: 'rejected' must be a list of texts"),
        (2, {"num_correct": 2}, "num_correct is 2, chosen has 1"),
        (2, {"subset": "Ties"}, "id is '7'; in the Ties subset it is ref:N or tied:N"),
        (2, {"subset": "Ties", "id": "ref:3"}, "'ref:3' of the Ties subset comes twice"),
        (2, {"subset": "Ties", "id": "tied:1"}, "'chosen' must be several texts"),
        (3, {}, "there are versions 1 and 2"),
    ],
)
def test_what_does_not_fit_is_told_by_row(
    tmp_path: Path, version: int, change: dict[str, Any], message: str
) -> None:
    first, *others = V1 if version == 1 else V2
    data = write(tmp_path / "b.jsonl", [{**first, **change}, *others])
    with pytest.raises(ValueError, match=message):
        read_benchmark(data, version)


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no.parquet does not exist"):
        read_benchmark(str(tmp_path / "no.parquet"), 2)
    broken = tmp_path / "broken.parquet"
    broken.write_text("not parquet")
    with pytest.raises(ValueError, match=r"broken.parquet cannot be read"):
        read_benchmark(str(broken), 2)
    cut = Path(write(tmp_path / "cut.jsonl.gz", V2))
    cut.write_bytes(cut.read_bytes()[:-20])
    with pytest.raises(
        ValueError, match=r"cut.jsonl.gz cannot be read from line \d on: Compressed"
    ):
        read_benchmark(str(cut), 2)
    garbage = tmp_path / "garbage.jsonl"
    for text, why in (
        (b"\n[1]", "2: a row must be"),
        (b"\xff", "1: not UTF-8"),
        (b"{", "1: not JSON"),
    ):
        garbage.write_bytes(text)
        with pytest.raises(ValueError, match=f"garbage.jsonl:{why}"):
            read_benchmark(str(garbage), 2)
    garbage.write_text("\n")
    with pytest.raises(ValueError, match=r"garbage.jsonl holds no rows"):
        read_benchmark(str(garbage), 2)


def test_a_subset_is_known_in_any_case(tmp_path: Path) -> None:
    focus, ref, tied = V2
    rows = [{**focus, "subset": "focus"}, ref, {**tied, "subset": "TIES"}]
    found = read_benchmark(write(tmp_path / "b.jsonl", rows), 2)
    assert [row.subset for row in found] == ["Focus", "Ties", "Ties"]
    result = score_v2(found, [(1.0, 0.0, 0.0, 0.0), (1.0, 0.0, 0.0), (3.0, 3.0, 3.0, 0.0, 0.0)])
    assert result["subsets"]["Ties"]["num_rows"] == 2
    assert list(result["subsets"]) == ["Focus", "Ties"]
    other = [{**V1[0], "subset": "HEP-go"}, {**V1[1], "subset": "math_prm"}]
    found = read_benchmark(write(tmp_path / "b.jsonl", other), 1)
    assert [row.subset for row in found] == ["hep-go", "math_prm"]


def test_version_1_end_to_end_with_a_sample_that_is_too_long(
    export_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from reward_actor import RewardScorer

    data = write(tmp_path / "v1.jsonl", V1)
    command = ["eval", str(export_dir), data, "--rewardbench", "1", "--device", "cpu"]
    assert rayward.main([*command, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    scorer = RewardScorer.from_pretrained(export_dir, device="cpu")
    for raw in V1[:2]:
        chosen, rejected = scorer.score([Group(raw["prompt"], [raw["chosen"], raw["rejected"]])])[
            0
        ].rewards
        assert chosen is not None
        assert rejected is not None
        assert result["subsets"][raw["subset"]]["accuracy"] == float(chosen > rejected)
    assert result["subsets"]["alpacaeval-easy"]["accuracy"] == 0
    assert (result["num_rows"], result["num_unscored"]) == (3, 1)
    assert result["errors"] == {"too_long": 1}
    assert result["model_version"] == scorer.model_version
    assert result["score"] is None
    assert rayward.main(command) == 0
    shown = capsys.readouterr().out
    assert "RewardBench 1" in shown
    assert "Chat Hard" in shown
    assert "alpacaeval-length, alpacaeval-hard, mt-bench-easy" in " ".join(shown.split())
    assert "alpacaeval-easy" in shown
