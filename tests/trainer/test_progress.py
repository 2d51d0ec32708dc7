"""The terminal's view of a training: every line once, whatever happens to the files."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from log_lines import evaluation_line, step_line
from rich.console import Console

from trainer.log import EVALUATIONS_FILE, LOG_FILE, TrainingLog
from trainer.report import progress
from trainer.report.progress import Line, follow, plain, show


def write(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def append(path: Path, lines: list[dict[str, Any]]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_POLL_S", 0.0)


def playing(*acts: Callable[[], Any]) -> Callable[[], bool]:
    """An `is_running` that plays one act at each call, and says no at the last."""
    left = list(acts)

    def is_running() -> bool:
        if left:
            left.pop(0)()
        return bool(left)

    return is_running


def steps(batches: Any) -> list[tuple[str, int]]:
    return [(line.kind, line.values["step"]) for batch in batches for line in batch]


def test_every_line_comes_once_in_the_order_of_the_steps(tmp_path: Path) -> None:
    log, evaluations = tmp_path / LOG_FILE, tmp_path / EVALUATIONS_FILE
    acts = playing(
        lambda: write(log, [step_line(1)]),
        lambda: None,
        lambda: (
            append(log, [step_line(2), step_line(3)]),
            write(evaluations, [evaluation_line(2)]),
        ),
        lambda: append(log, [step_line(4)]),
    )
    assert steps(follow(tmp_path, 0, acts)) == [
        ("train", 1), ("train", 2), ("heldout", 2), ("train", 3), ("train", 4),
    ]  # fmt: skip


def test_a_restarted_worker_that_writes_the_log_anew_shows_no_step_twice(tmp_path: Path) -> None:
    log = tmp_path / LOG_FILE

    def restart() -> None:
        again = TrainingLog(log, 2)  # from the checkpoint of step 2
        for step in range(3, 9):
            again.write(step_line(step, seed=1))
        again.close()

    acts = playing(lambda: write(log, [step_line(step) for step in range(1, 6)]), restart)
    assert steps(follow(tmp_path, 0, acts)) == [("train", step) for step in range(1, 9)]


def test_what_an_earlier_process_left_is_not_new_until_it_is_computed_again(tmp_path: Path) -> None:
    log, evaluations = tmp_path / LOG_FILE, tmp_path / EVALUATIONS_FILE
    write(log, [step_line(step) for step in range(1, 6)])  # killed after step 5
    write(evaluations, [evaluation_line(2)])

    def restart() -> None:
        again = TrainingLog(log, 2)
        again.write(step_line(3, seed=1))
        again.close()
        append(evaluations, [evaluation_line(4)])

    batches = list(follow(tmp_path, 2, playing(lambda: None, restart)))
    assert steps(batches) == [("train", 3), ("heldout", 4)]
    assert batches[0][0].values == step_line(3, seed=1)


def test_the_last_evaluation_is_shown_when_all_steps_were_made_before(tmp_path: Path) -> None:
    write(tmp_path / LOG_FILE, [step_line(1), step_line(2)])
    acts = playing(lambda: write(tmp_path / EVALUATIONS_FILE, [evaluation_line(2)]))
    assert steps(follow(tmp_path, 2, acts)) == [("heldout", 2)]


def test_a_line_that_is_being_written_waits_for_its_end(tmp_path: Path) -> None:
    log, text = tmp_path / LOG_FILE, json.dumps(step_line(1)) + "\n"
    acts = playing(lambda: log.write_text(text[:50]), lambda: log.write_text(text))
    assert steps(follow(tmp_path, 0, acts)) == [("train", 1)]


BROKEN = (
    b"{}", b"null", b"[1]", b'{"step": null}', b'{"step": "7"}', b"\x00\xff{", b'{"step": 8, "lo',
)  # fmt: skip


@pytest.mark.parametrize("is_terminal", [True, False])
def test_no_line_ends_the_display(tmp_path: Path, is_terminal: bool) -> None:
    screen = Console(
        file=io.StringIO(), force_terminal=is_terminal, width=110, record=True, legacy_windows=False
    )
    odd = [{"step": 9}, {"step": 10, "loss": None, "accuracy": "high", "padding_saved": math.nan}]
    acts = playing(
        lambda: [
            (tmp_path / name).write_bytes(b"\n".join(BROKEN) + b"\n")
            for name in (LOG_FILE, EVALUATIONS_FILE)
        ],
        lambda: [append(tmp_path / name, odd) for name in (LOG_FILE, EVALUATIONS_FILE)],
        lambda: append(tmp_path / LOG_FILE, [step_line(11)]),
    )
    told: list[Line] = []
    show(tmp_path, 0, 20, acts, also=told.extend, console=screen)
    assert [(line.kind, line.values["step"]) for line in told] == [
        ("train", 9), ("heldout", 9), ("train", 10), ("heldout", 10), ("train", 11)
    ]  # fmt: skip


def test_the_errors_of_attributes_are_shown(tmp_path: Path) -> None:
    line = Line("heldout", {"step": 4, "rmse_kind [0, 1]": 0.25, "rmse_brief": 1.5})
    assert plain(line, 8) == "step 4/8  held out: rmse_kind [0, 1] 0.250  rmse_brief 1.500"
    screen = Console(file=io.StringIO(), force_terminal=True, width=110, record=True)
    acts = playing(
        lambda: None,
        lambda: write(tmp_path / LOG_FILE, [step_line(4)]),
        lambda: write(tmp_path / EVALUATIONS_FILE, [line.values]),
    )
    show(tmp_path, 0, 8, acts, console=screen)
    assert "held out at step 4: rmse_kind [0, 1] 0.250, rmse_brief 1.500" in screen.export_text()


def test_without_a_terminal_about_twenty_plain_lines_are_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told: list[Line] = []
    acts = playing(
        lambda: write(tmp_path / LOG_FILE, [step_line(step) for step in range(1, 201)]),
        lambda: write(tmp_path / EVALUATIONS_FILE, [evaluation_line(200)]),
    )
    show(tmp_path, 0, 200, acts, also=told.extend)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 22
    first = step_line(1)
    assert printed[0] == (
        f"step 1/200  loss {first['loss']:.4f}  accuracy {first['accuracy']:.3f}  "
        f"raw_margin {first['raw_margin']:.3f}  {first['pairs_per_s']:.0f} pairs/s"
    )
    assert printed[-1] == plain(Line("heldout", evaluation_line(200)), 200)
    assert printed[-1].startswith("step 200/200  held out: accuracy 0.795 (0.760 to 0.828)")
    assert len(told) == 201


def test_a_terminal_gets_one_display_with_everything_on_it(tmp_path: Path) -> None:
    screen = Console(
        file=io.StringIO(), force_terminal=True, width=110, record=True, legacy_windows=False
    )
    acts = playing(
        lambda: None,
        lambda: write(tmp_path / LOG_FILE, [step_line(step) for step in range(1, 101)]),
        lambda: write(tmp_path / EVALUATIONS_FILE, [evaluation_line(100)]),
    )
    show(tmp_path, 0, 200, acts, console=screen)
    shown = screen.export_text()
    last = step_line(100)
    for expected in (
        "100/200",
        f"loss {last['loss']:.4f}",
        f"accuracy {last['accuracy']:.3f}",
        f"raw margin {last['raw_margin']:.3f}",
        f"{last['pairs_per_s']:,.1f} pairs/s",
        f"{last['tokens_per_s']:,.0f} tokens/s",
        f"{last['padding_saved']:.0%} of padding saved",
        "1,204 MB",
        "left",
        "held out at step 100: accuracy 0.759 (0.724 to 0.792)",
    ):
        assert expected in shown
