"""The report of a training: its plots and its page, whatever the samples hold."""

from __future__ import annotations

import base64
import importlib.util
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reports
from hypothesis import given
from hypothesis import strategies as st
from log_lines import evaluation_line, step_line
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from reports import CONTRACT, FACTS, config_of, plausible

from trainer.config.config_file import load_config
from trainer.config.data import Source
from trainer.config.train import TrainConfig
from trainer.data.comparisons import Comparison, Comparisons
from trainer.evaluation.metrics import compare_with_baselines, evaluate
from trainer.report import plots
from trainer.report.page import write_report
from trainer.report.plots import smooth
from trainer.report.templates import TEMPLATES

Decode = Callable[[Sequence[int]], str]
RAW_SCALE = 2
PNG = b"\x89PNG\r\n\x1a\n"
PLOTS = ("loss", "accuracy", "margin", "calibration", "rewards", "length")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return reports.tokenizer()


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    return config_of(tmp_path_factory.mktemp("run") / "polite")


def written(directory: Path, config: TrainConfig, decode: Decode, **given: Any) -> str:
    """The page of a report of these things, and nothing else."""
    parts = {
        "facts": FACTS, "metrics": {}, "log": [], "evaluations": [], "heldout": None,
        "raw_scores": None, "rewards": None,
    }  # fmt: skip
    if "rewards" in given:
        given = {"raw_scores": RAW_SCALE * given["rewards"], **given}
    write_report(directory, config=config, contract=CONTRACT, decode=decode, **parts | given)
    return (directory / "report.html").read_text(encoding="utf-8")


class Page(HTMLParser):
    """The elements of a page, and whether each is closed in its turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.tags: set[str] = set()
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def check_is_alone(text: str) -> None:
    """Nothing of the page is fetched or run: no script, no address but data and places in it."""
    page = Page(text)
    assert page.tags.isdisjoint({"script", "link", "iframe", "object", "embed", "form", "base"})
    for tag, name, value in page.attributes:
        assert not name.startswith("on"), (tag, name)
        if name in ("src", "href"):
            assert value.startswith(("data:image/png;base64,", "#")), (tag, name, value[:80])
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)
    assert style is not None
    assert "url(" not in style[1]
    assert "@import" not in style[1]


def test_a_whole_report_stands_alone_and_holds_every_number(
    tmp_path: Path, config: TrainConfig, tokenizer: Any
) -> None:
    held, rewards = plausible(tokenizer)
    beaten = compare_with_baselines(
        held, rewards, {"length": -held.lengths, "bag of words": rewards}
    )
    log = [step_line(step) for step in range(1, 201)]
    evaluations = [evaluation_line(step) for step in range(25, 201, 25)]
    names = write_report(
        tmp_path, config=config, contract=CONTRACT, facts=FACTS, log=log,
        metrics={"baselines": {name: asdict(one) for name, one in beaten.items()}},
        evaluations=evaluations, heldout=held, raw_scores=RAW_SCALE * rewards, rewards=rewards,
        decode=tokenizer.decode,
    )  # fmt: skip
    assert names == ["report.html", *(f"plots/{name}.png" for name in PLOTS)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plots", "report.html"]
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    check_is_alone(text)
    for name in PLOTS:
        png = (tmp_path / "plots" / f"{name}.png").read_bytes()
        assert png.startswith(PNG)
        assert base64.b64encode(png).decode() in text
    result = evaluate(held, RAW_SCALE * rewards, rewards)
    for shown in (
        "Reward model: polite",
        f"{100 * result.accuracy:.1f} %",
        f"95 %: {100 * result.accuracy_low:.1f} to {100 * result.accuracy_high:.1f} %",
        f">{result.reward_margin:.3f}<",
        f"of raw scores {result.raw_margin:.3f}",
        f"{result.log_loss:.4f}",
        "text: the tokenizer has no chat template",
        f"{result.length_correlation:+.2f}",
        "math &amp; logic",
        "&lt;i&gt;chat&lt;/i&gt;",
        "8,168",
        "3 (3 too long)",
        "optimizer.learning_rate",
        f"{result.num_calibration_bins} of 10 bins have pairs",
        "Is it better than that?",
        f"{100 * beaten['length'].lead.mean:+.1f} points",
        "not shown to be better",
    ):
        assert shown in text


@pytest.mark.parametrize("num_steps", [1, 3, 200])
def test_axes_count_whole_steps_and_legends_hide_no_data(num_steps: int) -> None:
    log = [step_line(step, num_steps) for step in range(1, num_steps + 1)]
    for draw in (plots._loss, plots._accuracy, plots._margin):
        figure = Figure(layout="constrained")
        axes = figure.add_subplot()
        draw(axes, log, [evaluation_line(num_steps, num_steps)])
        FigureCanvasAgg(figure).draw()
        assert all(float(step).is_integer() for step in axes.get_xticks())
        [legend] = figure.legends
        width = figure.bbox.width
        assert legend.get_window_extent().y1 < axes.get_tightbbox().y0  # type: ignore[union-attr]
        assert 0 <= legend.get_window_extent().x0 < legend.get_window_extent().x1 <= width


def test_equal_numbers_give_equal_bytes(
    tmp_path: Path, config: TrainConfig, tokenizer: Any
) -> None:
    held, rewards = plausible(tokenizer, 40)
    log = [step_line(step) for step in range(1, 9)]
    for name in ("a", "b"):
        written(tmp_path / name, config, tokenizer.decode, log=log, heldout=held, rewards=rewards)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.*"))
    assert len(files) == 7
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_without_matplotlib_a_report_says_why_it_has_no_pictures(
    tmp_path: Path, config: TrainConfig, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else found(name)
    )
    held, rewards = plausible(tokenizer, 20)
    text = written(
        tmp_path, config, tokenizer.decode, log=[step_line(1)], heldout=held, rewards=rewards
    )
    check_is_alone(text)
    assert "matplotlib is not installed where this was trained" in text
    assert "<img " not in text
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_nothing_held_out_leaves_out_what_needs_it(
    tmp_path: Path, config: TrainConfig, tokenizer: Any
) -> None:
    log = [step_line(step) for step in range(1, 5)]
    text = written(tmp_path, config, tokenizer.decode, log=log)
    check_is_alone(text)
    assert "nothing is known about its accuracy" in text
    assert 'id="hardest"' not in text
    assert text.count("<img ") == 3


def test_an_empty_held_out_set_is_nothing_held_out(
    tmp_path: Path, config: TrainConfig, tokenizer: Any
) -> None:
    text = written(
        tmp_path, config, tokenizer.decode, heldout=Comparisons.of([], []),
        rewards=np.empty(0, np.float32),
    )  # fmt: skip
    assert "nothing is known about its accuracy" in text
    assert text.count("<img ") == 0


def test_attributes_alone_have_no_pairs_to_show(
    tmp_path: Path, config: TrainConfig, tokenizer: Any
) -> None:
    alone = Comparisons.of([Comparison([[5, 6]], (0,), "a", attributes=[[0.5]])], ["a.jsonl"], 1)
    log = [{**step_line(1), "accuracy": 0.0, "raw_margin": 0.0, "num_pairs": 0}]
    text = written(
        tmp_path, config, tokenizer.decode, log=log, heldout=alone, rewards=np.zeros(1, np.float32)
    )
    check_is_alone(text)
    assert text.count("<img ") == 1


@pytest.mark.parametrize("num_steps", [0, 1])
def test_a_log_of_one_step_or_none_is_enough(
    tmp_path: Path, config: TrainConfig, tokenizer: Any, num_steps: int
) -> None:
    held, rewards = plausible(tokenizer, 1)
    log = [step_line(1)][:num_steps]
    text = written(
        tmp_path, config, tokenizer.decode, log=log, evaluations=[evaluation_line(1)],
        heldout=held, rewards=rewards,
    )  # fmt: skip
    check_is_alone(text)
    assert text.count("<img ") == 3 + 3 * num_steps


def test_equal_rewards_make_a_report_too(
    tmp_path: Path, config: TrainConfig, tokenizer: Any
) -> None:
    held, rewards = plausible(tokenizer, 30)
    text = written(tmp_path, config, tokenizer.decode, heldout=held, rewards=np.zeros_like(rewards))
    assert "not defined" in text  # the correlation with length
    assert "50.0 %" in text
    assert "The accuracy is not above chance" in text


def test_the_report_shows_names_and_never_a_path(tmp_path: Path, tokenizer: Any) -> None:
    home = "/home/someone/secret"
    given = {
        "model.path": f"{home}/bases/small",
        "data.train": f"{{{home}/a/pairs.jsonl: 1, {home}/b/pairs.jsonl: 2, lab/set:train: 1}}",
        "data.eval": f"{home}/held.jsonl",
        "output_dir": f"{home}/polite",
        "checkpoint.storage_path": "s3://secret-bucket/runs",
        "distributed.deepspeed": f"{{zero_optimization: {{offload: [{home}/nvme]}}}}",
    }
    config = load_config(None, list(given.items()))
    held, rewards = plausible(tokenizer, 20)
    text = written(tmp_path, config, tokenizer.decode, heldout=held, rewards=rewards)
    assert "secret" not in text
    assert "pairs.jsonl, pairs.jsonl (2) (weight 2), lab/set:train" in text
    assert "{pairs.jsonl: 1.0, pairs.jsonl (2): 2.0, &#39;lab/set:train&#39;: 1.0}" in text
    assert '<td class="key">data.eval</td><td class="setting">held.jsonl</td>' in text
    for name in ("small, all weights, text format", "held.jsonl", "runs", "nvme"):
        assert name in text


def test_a_base_model_of_its_own_is_from_scratch(tmp_path: Path, tokenizer: Any) -> None:
    config = config_of(tmp_path / "polite")
    for path in (None, str(tmp_path / "polite" / "base")):
        config.model.path = path
        assert "from scratch, all weights" in written(tmp_path, config, tokenizer.decode)


@pytest.mark.parametrize("num_shared", [0, 7])
def test_the_report_says_how_the_held_out_pairs_were_used(
    tmp_path: Path, tokenizer: Any, num_shared: int
) -> None:
    config = config_of(tmp_path / "polite")
    config.data.eval = {"held.jsonl": Source.model_validate({})}
    config.evaluation.every_steps, config.evaluation.keep_best = 1, True
    held, rewards = plausible(tokenizer, 20)
    text = written(
        tmp_path, config, tokenizer.decode, heldout=held, rewards=rewards,
        facts=replace(FACTS, num_shared_prompts=num_shared), metrics={"rmse_kind": 0.25},
    )  # fmt: skip
    check_is_alone(text)
    assert "The checkpoint was chosen on these pairs" in text
    assert "%, resampled by prompt" in text
    assert ("7 of their prompts were trained on as well" in text) is (num_shared > 0)
    assert ("about prompts that were not trained on" in text) is (num_shared == 0)
    assert "error of kind" in text


HOSTILE = [
    "<script>alert(1)</script><img src=x onerror=alert(2)>",
    '"><style>body{display:none}</style><a href="javascript:alert(3)">',
    "lone \ud800 surrogate and \udfff another",
    "\u202eevil right-to-left override \u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627",
    "nul \x00 bell \x07 escape \x1b[31m delete \x7f",
    "</pre></details></table></body></html>",
    "$title ${body} $ %s {x} {{y}} &amp; &#x3c;",
    "x" * 100_000,
    "日本語 ☀️ e\u0301" * 2_000,
    "",
]


def test_hostile_samples_are_shown_and_do_nothing(tmp_path: Path, config: TrainConfig) -> None:
    texts = {index + 10: text for index, text in enumerate(HOSTILE)}
    held = Comparisons.of(
        (
            Comparison([[index, 1], [index, index]], (1, 0), text, row=index, subset=text[:40])
            for index, text in texts.items()
        ),
        ['<b onclick="x">data</b>.jsonl'],
    )
    rewards = np.tile(np.float32([-1, 1]), len(held))
    text = written(
        tmp_path, config, lambda ids: "".join(texts.get(i, "?") for i in ids), heldout=held,
        rewards=rewards, facts=replace(FACTS, dropped="<script>"),
    )  # fmt: skip
    check_is_alone(text)
    assert len(text) < 3_000_000
    assert "&lt;script&gt;alert(1)" in text
    assert "80,000 characters" in text  # left out of the middle, after unfolding too
    assert text.count('dir="auto"') >= 3 * len(held)
    assert "\x00" not in text
    assert "nul \u2400 bell \u2407 escape \u241b" in text


@given(st.text(st.characters(), max_size=40))
def test_escaped_text_can_always_be_written_and_opens_nothing(text: str) -> None:
    escaped = TEMPLATES.from_string("{{ text }}").render(text=text)
    escaped.encode("utf-8")
    assert not set("<>\"'") & set(escaped)
    assert all(c.isprintable() or c in "\n\t" or ord(c) > 0x9F for c in escaped)


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=30), st.floats(1, 10))
def test_smoothing_stays_within_the_values_and_leaves_constants_alone(
    values: list[float], width: float
) -> None:
    averages = smooth(np.array(values), width)
    assert averages[0] == pytest.approx(values[0])
    assert min(values) - 1e-9 <= averages.min()
    assert averages.max() <= max(values) + 1e-9
    assert smooth(np.full(9, 0.25), width) == pytest.approx(np.full(9, 0.25))
