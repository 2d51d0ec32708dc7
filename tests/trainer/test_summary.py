"""What a training says at its end."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from trainer.config.data import DataConfig
from trainer.report.summary import show_summary, summary

if TYPE_CHECKING:
    from rich.text import Text

EXPORT = Path("/runs/my model/export")
LEAD = {"mean": 0.1, "low": -0.1, "high": 0.3, "stderr": 0.1, "num_prompts": 40}
FOUND = {
    "heldout_accuracy": 0.9,
    "heldout_accuracy_low": 0.812,
    "heldout_accuracy_high": 1.0,
    "heldout_num_pairs": 3_000,
    "heldout_num_prompts": 40,
    "heldout_baselines": {
        "length": {"accuracy": 0.8, "lead": LEAD},
        "bag of words": {"accuracy": 0.7, "lead": {**LEAD, "low": 0.05}},
    },
}


def said(found: dict[str, Any], **data: Any) -> list[Text]:
    return summary(EXPORT, found, DataConfig.model_validate({"train": "a.jsonl", **data}))


def red(lines: list[Text]) -> list[str]:
    return [str(line).strip() for line in lines if "red" in str(line.style)]


def test_the_accuracy_is_compared_with_what_it_has_to_beat() -> None:
    lines = said(FOUND)
    text = [str(line) for line in lines]
    assert text[1] == (
        "held-out accuracy 90.0 % (95 % interval 81.2 to 100.0 %) on 3,000 pairs of 40 prompts"
    )
    length, words = text[2:4]
    assert length == (
        "  length alone reaches 80.0 %; the model is ahead by +10.0 points (-10.0 to +30.0): "
        "not shown to be better"
    )
    assert words.endswith("(+5.0 to +30.0): better")
    assert red(lines) == [length.strip()]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.51, 0.6, None),
        (0.5, 0.6, "not above chance: the interval includes 50 %"),
        (0.2, 0.49, "below chance: the rejected side more often gets the higher reward"),
    ],
)
def test_chance_is_said_in_red(low: float, high: float, expected: str | None) -> None:
    ends = {"heldout_accuracy_low": low, "heldout_accuracy_high": high, "heldout_baselines": {}}
    assert red(said({**FOUND, **ends})) == ([expected] if expected else [])


def test_nothing_is_claimed_of_runs_that_measured_nothing() -> None:
    assert "no pairs were held out: nothing is known" in str(said({})[1])
    older = {key: FOUND[key] for key in list(FOUND)[:3]}  # of a version that counted no prompts
    assert not any("accuracy" in str(line) for line in said(older))
    rated = [str(line) for line in said({"heldout_rmse_kind": 0.25})]
    assert "  error of kind 0.250 (root mean square, held out)" in rated


def test_the_next_commands_can_be_typed() -> None:
    assert [str(line) for line in said(FOUND)[-5:]] == [
        f"the reward model is in {EXPORT}",
        "next:",
        "  rayward eval '/runs/my model/export' PAIRS.jsonl",
        "  rayward score '/runs/my model/export' COMPLETIONS.jsonl REWARDS.jsonl",
        "  rayward serve '/runs/my model/export'",
    ]
    assert "export' held.jsonl" in str(said(FOUND, eval="held.jsonl")[-3])
    for other in ("lab/pairs", {"held.jsonl": {"chosen_column": "better"}}):
        assert "export' PAIRS.jsonl" in str(said(FOUND, eval=other)[-3])


def test_it_is_printed_in_whole_lines_with_the_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / ("long" * 40)
    folder.mkdir()
    (folder / "report.html").touch()
    show_summary(folder, FOUND, DataConfig.model_validate({"train": "a.jsonl"}))
    lines = capsys.readouterr().out.splitlines()
    assert f"the report is {folder}/report.html" in lines
    assert f"  rayward serve {folder}" in lines
