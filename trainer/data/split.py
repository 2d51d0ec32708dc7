"""Rendered data to what a training uses: without repeats, split by prompt, weighted, reported."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from reward_actor.contract import sha256_text
from trainer.config.data import DataConfig
from trainer.data.comparisons import Comparisons, holds_ties
from trainer.data.gather import Gathered, first_uses, num_contradictions
from trainer.data.render import Dropped, Rules, Tally

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from reward_actor.contract import ScoringContract


MIN_PROMPTS = 100
"""With fewer held-out prompts the standard error of an accuracy is about 0.03 (at 0.9) to 0.05."""


@dataclass(frozen=True, kw_only=True)
class SourceFacts(Tally):
    """What is known of a source: the counts of its rows, and of its comparisons and the tokens of
    their sequences."""

    dropped: str
    """The rows that were left out, for people."""
    num_comparisons: int
    num_sequences: int
    num_tokens: int
    length_5: int
    """Percentiles of the sequences' lengths in tokens."""
    length_50: int
    length_95: int
    length_max: int
    shared_fraction: float
    """The share of the tokens that are another one's prefix: after the first sequence of a
    comparison, what all of it begins with need not be computed again."""


@dataclass(frozen=True, kw_only=True)
class DataFacts:
    """What the report says of the data."""

    max_length: int
    num_train: int
    num_heldout: int
    num_shared_prompts: int | None = None
    """Prompts of data.eval that are in data.train as well; None in files of an older version."""
    num_contradictions: int
    total: SourceFacts
    """Of all sources that are trained on, what is held out of them included."""
    sources: dict[str, SourceFacts]
    eval_sources: dict[str, SourceFacts]


@dataclass(frozen=True)
class Summary:
    """What is known about the data besides the data. Plain values: it is kept as JSON."""

    num_rows: int
    """Read of the training sources."""
    dropped: Dropped
    """Of the training sources; `.count` and `str()`."""
    facts: DataFacts
    warnings: list[str]
    """What is probably a mistake, and what to do about it."""


@dataclass(frozen=True)
class TrainingData:
    """What a worker trains and is measured on."""

    train: Comparisons
    heldout: Comparisons
    weights: tuple[float, ...]
    """Of each source of `train`: how often its comparisons are used in an epoch."""
    seed: int
    """Of what an epoch draws."""
    has_ties: bool
    """Whether any pair of `train` is a tie."""

    def use(self, epoch: int) -> NDArray[np.int64]:
        """The comparisons of `train` that make up an epoch (from 0): see `epoch_use`."""
        return epoch_use(self.train.sources, self.weights, self.seed, epoch)

    @cached_property
    def num_used(self) -> int:
        """How many those are, in every epoch."""
        return len(self.use(0))


@dataclass(frozen=True)
class Prepared(TrainingData, Summary):
    """The data of a training and how it came about."""

    row_format: str = ""
    """Chat or text, and why, for people."""

    @classmethod
    def of(
        cls,
        train: Comparisons,
        heldout: Comparisons,
        summary: Summary,
        data: DataConfig,
        seed: int,
    ) -> Prepared:
        """Raises ValueError if the weights of the sources leave nothing to train on."""
        sources = data.sources("train")
        prepared = cls(
            train=train,
            heldout=heldout,
            weights=tuple(sources[name].weight for name in train.source_names),
            seed=seed,
            has_ties=holds_ties(train),
            **vars(summary),
        )
        if not prepared.num_used:
            raise ValueError("data.train: the weights are so small that no pair is left to train")
        return prepared

    def digest(self) -> str:
        """sha256 of everything that training and its evaluation see.

        The first epoch stands for all: with other sources or weights it is another one, too.
        """
        use = hashlib.sha256(self.use(0).tobytes()).hexdigest()
        return sha256_text(self.train.digest() + self.heldout.digest() + use)

    def report(self) -> list[str]:
        """Lines for people, before the first step: how many pairs, what was left out, how long."""
        facts = self.facts
        heldout = "" if facts.eval_sources else f", {len(self.heldout)} held out by prompt,"
        lines = [
            f"{len(self.train)} training pairs{heldout} of {self.num_rows} rows; "
            f"dropped: {self.dropped}",
            f"rows are read as {self.row_format}",
        ]
        if facts.total.num_truncated:
            lines.append(f"{facts.total.num_truncated} over-long pairs cut on the left")
        if facts.num_contradictions:
            lines.append(f"{facts.num_contradictions} pairs are there both ways round, and kept")
        if len(facts.sources) > 1:
            used = np.bincount(self.train.sources[self.use(0)], minlength=len(facts.sources))
            for (name, of), num in zip(facts.sources.items(), used, strict=True):
                lines.append(
                    f"  {name}: {of.num_comparisons} pairs of {of.num_rows} rows, {num} in "
                    f"an epoch; dropped: {of.dropped}; {_lengths(of)}"
                )
        lines.append(f"{_lengths(facts.total)}, limit {facts.max_length}")
        for name, of in facts.eval_sources.items():
            cut = f", {of.num_truncated} cut on the left," if of.num_truncated else ""
            lines.append(
                f"evaluated on {name}: {of.num_comparisons} pairs{cut} of {of.num_rows} "
                f"rows; dropped: {of.dropped}; {_lengths(of)}"
            )
        return lines


def rules_of(data: DataConfig, attributes: Iterable[str]) -> Rules:
    return Rules(tuple(attributes), data.over_long, data.split_seed)


def decide(
    everything: Sequence[Gathered],
    data: DataConfig,
    attributes: Iterable[str],
    contract: ScoringContract,
) -> tuple[NDArray[np.int64], NDArray[np.int64], Summary]:
    """Which comparisons are trained on, which are held out, and what there is to say about it.

    `everything` is the training sources, of which some are held out, or those and the ones for
    evaluation, which all are. Raises ValueError if nothing would be left to train, or to train one
    of the `attributes` by.
    """
    gathered = everything[0]
    used = [
        first_uses(some, by_subset=number == 1) if data.deduplicate else np.arange(len(some.marks))
        for number, some in enumerate(everything)
    ]
    _check_attributes(gathered, attributes)
    keys = gathered.marks["key"][used[0]]
    warnings = _warnings(everything, contract)
    if len(everything) == 1:
        is_heldout = split_by_prompt(keys, data.eval_fraction, data.fold)
        train, heldout = used[0][~is_heldout], used[0][is_heldout]
        both = 0
        warnings += _doubtful_splits(gathered) if len(heldout) else []
        hint = "" if data.fold else "; rayward train --folds 5 measures by all prompts"
        warnings += [told + hint for told in few_prompts(gathered.comparisons, heldout)]
        if data.fold is not None:
            _check_fold(data.fold, gathered.comparisons.is_decided[used[0]], is_heldout)
    else:
        train, heldout = used
        both = len(np.intersect1d(keys, everything[1].marks["key"][heldout]))
        if both:
            warnings.append(
                f"{both} prompts of data.eval are in data.train as well: the held-out numbers "
                "will be too good; take them out of one of the two"
            )
        warnings += few_prompts(everything[1].comparisons, heldout)
    total = sum(gathered.tallies, Tally())
    facts = DataFacts(
        max_length=contract.max_length,
        num_train=len(train),
        num_heldout=len(heldout),
        num_shared_prompts=both,
        num_contradictions=num_contradictions(gathered.marks[used[0]]),
        total=_measured(gathered, used[0], total),
        sources=_measured_by_source(gathered, used[0]),
        eval_sources=_measured_by_source(everything[1], heldout) if everything[1:] else {},
    )
    dropped = Dropped(**{item.name: getattr(total, item.name) for item in fields(Dropped)})
    return train, heldout, Summary(total.num_rows, dropped, facts, warnings)


def few_prompts(comparisons: Comparisons, heldout: NDArray[np.int64] | None = None) -> list[str]:
    """A warning if those that are held out (all of them by default) have pairs of few prompts."""
    index = np.arange(len(comparisons)) if heldout is None else heldout
    index = index[comparisons.is_decided[index]]
    num_prompts = len(np.unique(comparisons.prompts[index]))
    if not 0 < num_prompts < MIN_PROMPTS:
        return []
    of = f"{num_prompts} prompt{'s' if num_prompts > 1 else ''}"
    return [
        f"the {len(index):,} held-out pairs or rankings are about {of}: with fewer than "
        f"{MIN_PROMPTS} an accuracy is a rough guess"
    ]


def without_scores(name: str, tally: Tally) -> list[str]:
    """A warning of rankings whose order nobody gave."""
    if not tally.num_without_scores:
        return []
    return [
        f"{name}: {tally.num_without_scores} of {tally.num_rows} rows are rankings without scores, "
        "whose completions are taken to be best first; if they are not, name a scores_column"
    ]


def _check_fold(fold: str, is_decided: NDArray[np.bool_], is_heldout: NDArray[np.bool_]) -> None:
    """Raise ValueError for (C,) comparisons of which the fold cannot measure an accuracy."""
    for is_side, side in ((is_heldout, "held out"), (~is_heldout, "trained on")):
        if not (is_side & is_decided).any():
            raise ValueError(f"data.fold: {fold}: no pair is {side}; use fewer folds")


def split_by_prompt(
    keys: NDArray[np.bytes_], fraction: float, fold: str | None = None
) -> NDArray[np.bool_]:
    """(C,) which comparisons are held out: all of one key, or none.

    Which keys those are depends on the keys, not on the order of the rows. They are a `fraction` of
    them, but at least one if it is above 0; or one of as many equal parts as `fold` says ("2/5"),
    which together are all of them. Raises ValueError if nothing would be left to train.
    """
    different = np.unique(keys)  # sorted: digests, so in an order of their own
    if fold is not None:
        number, num_folds = map(int, fold.split("/"))
        if num_folds > len(different):
            raise ValueError(
                f"data.fold is {fold}, but there are only {len(different)} different prompts"
            )
        return np.isin(keys, different[number - 1 :: num_folds])
    if fraction == 0:
        return np.zeros(len(keys), dtype=bool)
    num_heldout = max(1, round(fraction * len(different)))
    if num_heldout >= len(different):
        raise ValueError(
            f"data.eval_fraction is {fraction}: of {len(different)} different prompts, "
            f"{num_heldout} would be held out and none left to train; add data or set it to 0"
        )
    return np.isin(keys, different[:num_heldout])


def epoch_use(
    sources: NDArray[np.int32], weights: Sequence[float], seed: int, epoch: int
) -> NDArray[np.int64]:
    """The comparisons of an epoch (from 0), rising: each as often as its source's weight is whole,
    and of each source a random share once more, as large as the rest of the weight.

    Every epoch draws its own share, of the same size; it depends on these arguments alone.
    """
    times = np.array([int(weight) for weight in weights], dtype=np.int64)[sources]
    for number, weight in enumerate(weights):
        mine = np.flatnonzero(sources == number)
        # Four numbers: the order of a batch is drawn from two (`micro_batches.global_batch`).
        random = np.random.Generator(np.random.PCG64([seed, number, epoch, 1]))
        times[random.permutation(mine)[: round((weight - int(weight)) * len(mine))]] += 1
    return np.repeat(np.arange(len(sources), dtype=np.int64), times)


def _check_attributes(gathered: Gathered, attributes: Iterable[str]) -> None:
    """Raise ValueError for a head without any target. A source may well have none for it."""
    for name, targets in zip(attributes, gathered.comparisons.attributes.T, strict=True):
        if np.isnan(targets).all():
            sources = ", ".join(gathered.comparisons.source_names)
            raise ValueError(f"loss.attributes: no row of {sources} has the attribute {name!r}")


def _warnings(everything: Sequence[Gathered], contract: ScoringContract) -> list[str]:
    warnings = []
    if contract.template_date is not None:
        warnings.append(
            f"the chat template writes today's date; {contract.template_date} is kept for good in "
            "the scoring contract. Use a template without strftime_now if rewards should not "
            "depend on it"
        )
    for gathered in everything:
        for name, of in zip(gathered.comparisons.source_names, gathered.tallies, strict=True):
            if of.num_double_bos:
                warnings.append(
                    f"{name}: {of.num_double_bos} rows begin with two BOS tokens: one is in the "
                    "text or its chat template and the tokenizer adds another; take one away"
                )
            if 2 * of.num_too_long > of.num_rows:
                warnings.append(
                    f"{name}: {of.num_too_long} of {of.num_rows} rows are dropped as longer than "
                    f"{contract.max_length} tokens; raise model.max_length or set data.over_long "
                    "to truncate_left"
                )
            if of.num_prompts_differ:
                warnings.append(
                    f"{name}: in {of.num_prompts_differ} of {of.num_rows} rows the completions "
                    "answer different prompts; what is learned from those is the prompt. See "
                    "whether the columns are the right ones"
                )
            warnings += without_scores(name, of)
            if of.num_unlabelled == of.num_rows:
                warnings.append(
                    f"{name}: nothing is learned or measured from its {of.num_rows} rows: none is "
                    "a pair or a ranking or has any of loss.attributes"
                )
    return warnings


def _doubtful_splits(gathered: Gathered) -> list[str]:
    """Warnings of sources whose prompts are guessed, so that a split by prompt may part them."""
    return [
        f"{name}: {of.num_without_prompt} of {of.num_rows} rows have no prompt of their own; what "
        "their completions begin with alike is taken for it, so that rows about one prompt may be "
        "both trained on and held out. Give a prompt column (prompt_ids with token ids) or a "
        "data.eval of other prompts"
        for name, of in zip(gathered.comparisons.source_names, gathered.tallies, strict=True)
        if of.num_without_prompt
    ]


def _measured_by_source(gathered: Gathered, index: NDArray[np.int64]) -> dict[str, SourceFacts]:
    sources = gathered.comparisons.sources[index]
    return {
        name: _measured(gathered, index[sources == number], gathered.tallies[number])
        for number, name in enumerate(gathered.comparisons.source_names)
    }


def _measured(gathered: Gathered, index: NDArray[np.int64], tally: Tally) -> SourceFacts:
    """Of these comparisons; `tally` is of the rows that they come from."""
    comparisons = gathered.comparisons
    num = np.diff(comparisons.starts)
    chosen = np.zeros(len(comparisons), dtype=bool)
    chosen[index] = True
    lengths = comparisons.lengths[np.repeat(chosen, num)]
    shared = gathered.marks["shared"][index].astype(np.int64) * (num[index] - 1)
    at = np.percentile(lengths, (5, 50, 95)).astype(int) if len(lengths) else (0, 0, 0)
    return SourceFacts(
        **vars(tally),
        dropped=str(tally),
        num_comparisons=len(index),
        num_sequences=len(lengths),
        num_tokens=int(lengths.sum()),
        length_5=int(at[0]),
        length_50=int(at[1]),
        length_95=int(at[2]),
        length_max=int(lengths.max(initial=0)),
        shared_fraction=round(float(shared.sum() / max(1, lengths.sum())), 4),
    )


def _lengths(of: SourceFacts) -> str:
    return (
        f"tokens: 5 % {of.length_5}, median {of.length_50}, 95 % {of.length_95}, longest "
        f"{of.length_max}, {of.shared_fraction:.0%} of them shared prefixes"
    )
