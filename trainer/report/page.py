"""`report.html`: what a training gave, in one file that needs nothing else.

Shapes: S sequences, P pairs.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

import numpy as np

from reward_actor.contract import ScoringContract
from trainer.config.options import leaves
from trainer.config.train import TrainConfig
from trainer.data.comparisons import Comparisons
from trainer.evaluation.metrics import RMSE, EvalResult, evaluate, pair_indices
from trainer.report import describe
from trainer.report.hardest import HardPair, hardest_pairs
from trainer.report.plots import HeldOut, Lines, write_plots
from trainer.report.tracking import settings_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

REPORT_FILE = "report.html"
PLOTS_DIR = "plots"
_SHOWN_CHARS = 500
_MAX_CHARS = 20_000
_TEMPLATE = Path(__file__).with_name("report.html")


def write_report(
    directory: Path,
    *,
    config: TrainConfig,
    contract: ScoringContract,
    facts: Mapping[str, Any],
    log: Lines,
    evaluations: Lines,
    heldout: Comparisons | None,
    rewards: NDArray[Any] | None,
    decode: Callable[[Sequence[int]], str],
) -> list[str]:
    """Write `directory/report.html` and `directory/plots/*.png`; returns their names in it. No
    path is shown.

    `rewards` (S,) are the raw scores of `heldout`'s sequences; `decode` turns token ids to text.
    """
    held, hard = None, []
    if heldout is not None and rewards is not None and len(pair_indices(heldout)[0]):
        held = _held_out(heldout, rewards)
        hard = hardest_pairs(heldout, rewards, decode)
    plots = write_plots(directory / PLOTS_DIR, log, evaluations, held)
    sections = []
    if held is not None or any(key.startswith(f"heldout_{RMSE}") for key in facts):
        what = "completions" if held is None else "pairs"
        sections.append(_notes(describe.heldout_notes(config, facts, what)))
    sections.append(_plots(directory / PLOTS_DIR, plots))
    if held is not None:
        sections += [_subsets(held.result), _pairs(hard)]
    sections += [_data(config, contract, facts), _settings(config)]
    name = config.report.run_name or Path(config.output_dir).name
    page = Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=escape(f"Reward model: {name}"),
        subtitle=escape(_subtitle(config, contract)),
        tiles="\n".join(_tiles(facts, log, held.result if held else None)),
        body="\n".join(sections),
    )
    (directory / REPORT_FILE).write_text(page, encoding="utf-8")
    return [REPORT_FILE, *(f"{PLOTS_DIR}/{plot}.png" for plot in plots)]


def escape(text: str) -> str:
    """Text for HTML: lone surrogates and control characters become visible ones."""
    text = re.sub("[\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", text.replace("\r\n", "\n"))
    # U+2400 and on are the pictures of the control characters.
    text = re.sub(r"[\x00-\x08\x0b-\x1f]", lambda match: chr(0x2400 + ord(match[0])), text)
    return html.escape(re.sub(r"[\x7f-\x9f]", "\N{REPLACEMENT CHARACTER}", text))


def _held_out(heldout: Comparisons, rewards: NDArray[Any]) -> HeldOut:
    chosen, rejected, _ = pair_indices(heldout)
    values, lengths = rewards.astype(np.float64), heldout.lengths
    return HeldOut(
        values[chosen],
        values[rejected],
        lengths[chosen],
        lengths[rejected],
        evaluate(heldout, rewards),
    )


def _subtitle(config: TrainConfig, contract: ScoringContract) -> str:
    trained = f"LoRA of rank {config.adapter.rank}" if config.adapter.rank else "all weights"
    return f"{describe.base_name(config)}, {trained}, {contract.format} format"


def _notes(notes: Sequence[str]) -> str:
    return "\n".join(f"<p>{escape(note)}</p>" for note in notes)


def _tiles(facts: Mapping[str, Any], log: Lines, result: EvalResult | None) -> Iterator[str]:
    if result is None:
        yield _tile("held-out pairs", "0", "nothing is known about its accuracy")
    else:
        low, high = 100 * result.accuracy_low, 100 * result.accuracy_high
        interval = f"95 %: {low:.1f} to {high:.1f} %, pairs taken as independent"
        yield _tile("held-out accuracy", _percent(result.accuracy), interval)
        yield _tile("held-out pairs", f"{result.num_pairs:,}", f"and {result.num_ties:,} ties")
        yield _tile("reward margin", f"{result.reward_margin:.3f}", "mean of chosen - rejected")
        yield _tile("log loss", f"{result.log_loss:.4f}", "guessing: 0.6931 (ln 2)")
        yield _tile("calibration error", _percent(result.calibration_error), "expected, 10 bins")
        length = result.length_correlation
        yield _tile(
            "reward and length",
            "not defined" if length is None else f"{length:+.2f}",
            "correlation",
        )
        for side, count, accuracy in (
            ("shorter", result.num_shorter, result.accuracy_shorter),
            ("longer", result.num_longer, result.accuracy_longer),
        ):
            if accuracy is not None:
                yield _tile(f"chosen is {side}", _percent(accuracy), f"accuracy of {count:,} pairs")
    for key, value in facts.items():
        name = key.removeprefix("heldout_")
        if key != name and name.startswith(RMSE):
            shown = f"error of {name.removeprefix(RMSE)}"
            yield _tile(shown, f"{value:.3f}", "root mean square, held out")
    yield _tile("training pairs", f"{facts['num_pairs']:,}", f"{facts['num_dropped']:,} dropped")
    yield _tile("optimizer steps", f"{facts['num_steps']:,}", "")
    if log:
        rates = [float(np.median([line[key] for line in log])) for key in _RATES]
        yield _tile("speed", f"{rates[0]:,.0f}", f"tokens/s, {rates[1]:,.1f} pairs/s (median)")
        saved = [line["padding_saved"] for line in log if line.get("padding_saved") is not None]
        if saved:
            yield _tile("padding saved", f"{np.mean(saved):.0%}", "of the padded tokens")
        memory = max(line["memory_mb"] for line in log)
        yield _tile("memory", f"{memory:,.0f} MB", "the highest of a worker")


_RATES = ("tokens_per_s", "pairs_per_s")


def _tile(name: str, value: str, note: str) -> str:
    return (
        f'<div><dt>{escape(name)}</dt><dd class="value">{escape(value)}</dd>'
        f"<dd>{escape(note)}</dd></div>"
    )


def _plots(directory: Path, plots: Mapping[str, str]) -> str:
    figures = []
    for name, shown in plots.items():
        data = base64.b64encode((directory / f"{name}.png").read_bytes()).decode("ascii")
        figures.append(
            f'<figure><img alt="{escape(shown)}" src="data:image/png;base64,{data}"></figure>'
        )
    body = "\n".join(figures)
    return _section("plots", "Curves", f'<div class="plots">\n{body}\n</div>')


def _subsets(result: EvalResult) -> str:
    if not result.subsets:
        return ""
    rows = "\n".join(
        f'<tr><td>{escape(name)}</td><td class="number">{subset.num_pairs:,}</td>'
        f'<td class="number">{_percent(subset.accuracy)}</td>'
        f'<td class="number">{subset.reward_margin:.3f}</td></tr>'
        for name, subset in result.subsets.items()
    )
    head = "<th>subset</th>" + "".join(
        f'<th class="number">{name}</th>' for name in ("pairs", "accuracy", "reward margin")
    )
    return _section(
        "subsets",
        "Subsets of the held-out pairs",
        f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>{rows}</tbody></table>'
        "</div>",
    )


def _pairs(pairs: Sequence[HardPair]) -> str:
    title = "The hardest held-out pairs"
    if not pairs:
        return _section("hardest", title, "<p>The chosen side is ahead in every pair.</p>")
    rows = "\n".join(_pair(pair) for pair in pairs)
    return _section(
        "hardest",
        title,
        "<p>Where the rejected side got the higher reward, the widest margin first. Some of these "
        "are the model's mistakes, and some the annotators'.</p>\n"
        '<table class="pairs"><thead><tr><th>margin</th><th>shared beginning</th><th>chosen</th>'
        f"<th>rejected</th></tr></thead>\n<tbody>{rows}</tbody></table>",
    )


def _pair(pair: HardPair) -> str:
    subset = f"<br>{escape(pair.subset)}" if pair.subset else ""
    cells = [
        f'<td><span class="reward">{pair.reward_margin:+.3f}</span>'
        f'<br><span class="soft">{escape(Path(pair.where).name)}{subset}</span></td>',
        f'<td data-name="shared beginning">{_text(pair.shared)}</td>',
    ]
    for side, reward, text in (
        ("chosen", pair.chosen_reward, pair.chosen),
        ("rejected", pair.rejected_reward, pair.rejected),
    ):
        cells.append(
            f'<td data-name="{side}"><span class="reward {side}">{reward:+.3f}</span>'
            f"{_text(text)}</td>"
        )
    return f"<tr>{''.join(cells)}</tr>"


def _text(text: str) -> str:
    """A block of text; a long one shows its ends, and unfolds. Each has its own direction."""
    if len(text) <= _SHOWN_CHARS:
        return f'<pre class="text" dir="auto">{escape(text)}</pre>'
    return (
        f'<details><summary><span class="text" dir="auto">{_ends(text, _SHOWN_CHARS)}</span>'
        f'</summary><pre class="text" dir="auto">{_ends(text, _MAX_CHARS)}</pre></details>'
    )


def _ends(text: str, most: int) -> str:
    """The text, or its first two thirds and last third of `most` characters, escaped."""
    if len(text) <= most:
        return escape(text)
    head, tail = text[: 2 * most // 3], text[-most // 3 :]
    left_out = len(text) - len(head) - len(tail)
    gap = f'<span class="gap">{left_out:,} characters</span>'
    return f"{escape(head)} {gap} {escape(tail)}"


def _data(config: TrainConfig, contract: ScoringContract, facts: Mapping[str, Any]) -> str:
    rows = {
        "trained on": describe.source_names(config, "train"),
        "evaluated on": describe.evaluation_set(config),
        "comparisons": describe.trained_on(facts["counts"]),
        "loss": describe.loss_settings(config, facts["counts"]),
        "dropped": f"{facts['num_dropped']:,} ({facts['dropped']})",
        "longest sequence": f"{contract.max_length:,} tokens at most",
    }
    if (contract.mean, contract.std) != (0.0, 1.0):
        rows["normalisation"] = (
            f"the export gives (reward - {contract.mean:.4g}) / {contract.std:.4g}; rewards in "
            "this report are without it"
        )
    return _section("data", "Data", _key_values(rows))


def _settings(config: TrainConfig) -> str:
    values = settings_of(describe.public(config))
    default = {key: str(field.default) for key, field in leaves() if not field.is_required()}
    changed = {key: value for key, value in values.items() if value != default.get(key)}
    same = {key: value for key, value in values.items() if key not in changed}
    return _section(
        "settings",
        "Settings",
        f"{_key_values(changed)}\n<details><summary>{len(same)} settings with their default values"
        f"</summary>{_key_values(same)}</details>",
    )


def _key_values(rows: Mapping[str, Any]) -> str:
    lines = "\n".join(
        f'<tr><td class="key">{escape(key)}</td>'
        f'<td class="setting">{escape(str(value).strip())}</td></tr>'
        for key, value in rows.items()
    )
    return f'<div class="wide"><table><tbody>{lines}</tbody></table></div>'


def _section(name: str, title: str, body: str) -> str:
    return f'<section id="{name}">\n<h2>{title}</h2>\n{body}\n</section>'


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
