"""Rendered data to what a training uses: without repeats, split by prompt, weighted, reported."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from reward_actor.contract import sha256_text
from trainer.comparisons import Comparisons
from trainer.config import TrainConfig
from trainer.gather import Gathered, first_uses, num_contradictions
from trainer.rendered import Dropped, Rules, Tally

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from reward_actor.contract import ScoringContract


@dataclass(frozen=True)
class Summary:
    """What is known about the data besides the data. Plain values: it is kept as JSON."""

    num_rows: int
    dropped: dict[str, int]
    facts: dict[str, Any]
    warnings: list[str]


@dataclass(frozen=True)
class TrainingData:
    """What a worker trains and is measured on."""

    train: Comparisons
    heldout: Comparisons
    use: NDArray[np.int64]
    """The comparisons of `train` that make up an epoch, repeated as their source's weight says."""
    has_ties: bool
    """Whether any pair of `train` is a tie."""


@dataclass(frozen=True)
class Prepared(TrainingData):
    """The data of a training and how it came about."""

    num_rows: int
    """Read of the training sources."""
    dropped: Dropped
    """Of the training sources; `.count` and `str()`."""
    facts: Mapping[str, Any]
    """What the report says: {"max_length", "num_train", "num_heldout", "num_contradictions",
    "total": {...}, "sources": {name: {...}}}; see `_measured`."""
    warnings: list[str] = field(default_factory=list)
    """What is probably a mistake, and what to do about it."""

    @classmethod
    def of(
        cls,
        train: Comparisons,
        heldout: Comparisons,
        summary: Summary,
        config: TrainConfig,
    ) -> Prepared:
        """Raises ValueError if the weights of the sources leave nothing to train on."""
        sources = config.data.sources("train")
        weights = [sources[name].weight for name in train.source_names]
        use = epoch_use(train.sources, weights, config.training.seed)
        if not len(use):
            raise ValueError("data.train: the weights are so small that no pair is left to train")
        from trainer.objective import holds_ties  # with torch, which only a training needs

        return cls(
            train=train,
            heldout=heldout,
            use=use,
            has_ties=holds_ties(train),
            num_rows=summary.num_rows,
            dropped=Dropped(**summary.dropped),
            facts=summary.facts,
            warnings=summary.warnings,
        )

    def digest(self) -> str:
        """sha256 of everything that training and its evaluation see."""
        use = hashlib.sha256(self.use.tobytes()).hexdigest()
        return sha256_text(self.train.digest() + self.heldout.digest() + use)

    def report(self) -> list[str]:
        """Lines for people, before the first step: how many pairs, what was left out, how long."""
        facts = self.facts
        lines = [
            f"{len(self.train)} training pairs, {len(self.heldout)} held out by prompt, "
            f"of {self.num_rows} rows; dropped: {self.dropped}"
        ]
        if facts["total"]["num_truncated"]:
            lines.append(f"{facts['total']['num_truncated']} over-long pairs cut on the left")
        if facts["num_contradictions"]:
            lines.append(f"{facts['num_contradictions']} pairs are there both ways round, and kept")
        if len(facts["sources"]) > 1:
            used = np.bincount(self.train.sources[self.use], minlength=len(facts["sources"]))
            for (name, of), num in zip(facts["sources"].items(), used, strict=True):
                lines.append(
                    f"  {name}: {of['num_comparisons']} pairs of {of['num_rows']} rows, {num} in "
                    f"an epoch; dropped: {of['dropped']}; {_lengths(of)}"
                )
        return [*lines, f"{_lengths(facts['total'])}, limit {facts['max_length']}"]


def rules_of(config: TrainConfig) -> Rules:
    return Rules(tuple(config.loss.attributes), config.data.over_long, config.data.split_seed)


def decide(
    everything: Sequence[Gathered], config: TrainConfig, contract: ScoringContract
) -> tuple[NDArray[np.int64], NDArray[np.int64], Summary]:
    """Which comparisons are trained on, which are held out, and what there is to say about it.

    `everything` is the training sources, of which some are held out, or those and the ones for
    evaluation, which all are. Raises ValueError if nothing would be left to train.
    """
    gathered = everything[0]
    used = [
        first_uses(some) if config.data.deduplicate else np.arange(len(some.marks))
        for some in everything
    ]
    _check_attributes(gathered, config)
    keys = gathered.marks["key"][used[0]]
    warnings = _warnings(everything, contract)
    if len(everything) == 1:
        is_heldout = split_by_prompt(keys, config.data.eval_fraction)
        train, heldout = used[0][~is_heldout], used[0][is_heldout]
    else:
        train, heldout = used
        both = len(np.intersect1d(keys, everything[1].marks["key"][heldout]))
        if both:
            warnings.append(
                f"{both} prompts of data.eval are in data.train as well: the held-out numbers "
                "will be too good; take them out of one of the two"
            )
    total = Tally()
    for tally in gathered.tallies:
        total.add(tally)
    names = gathered.comparisons.source_names
    sources = gathered.comparisons.sources[used[0]]
    facts = {
        "max_length": contract.max_length,
        "num_train": len(train),
        "num_heldout": len(heldout),
        "num_contradictions": num_contradictions(gathered.marks[used[0]]),
        "total": _measured(gathered, used[0], total),
        "sources": {
            name: _measured(gathered, used[0][sources == number], gathered.tallies[number])
            for number, name in enumerate(names)
        },
    }
    dropped = {key: value for key, value in asdict(total).items() if key in vars(Dropped())}
    return train, heldout, Summary(total.num_rows, dropped, facts, warnings)


def split_by_prompt(keys: NDArray[np.bytes_], fraction: float) -> NDArray[np.bool_]:
    """(C,) which comparisons are held out: all of one key, or none.

    Which keys those are depends on the keys, not on the order of the rows; at least one is, if
    `fraction` is above 0. Raises ValueError if nothing would be left to train.
    """
    if fraction == 0:
        return np.zeros(len(keys), dtype=bool)
    different = np.unique(keys)  # sorted: digests, so in an order of their own
    num_heldout = max(1, round(fraction * len(different)))
    if num_heldout >= len(different):
        raise ValueError(
            f"data.eval_fraction is {fraction}: of {len(different)} different prompts, "
            f"{num_heldout} would be held out and none left to train; add data or set it to 0"
        )
    return np.isin(keys, different[:num_heldout])


def epoch_use(sources: NDArray[np.int32], weights: Sequence[float], seed: int) -> NDArray[np.int64]:
    """The comparisons of an epoch, rising: each as often as its source's weight is whole, and of
    each source a random share once more, as large as the rest of the weight."""
    times = np.array([int(weight) for weight in weights], dtype=np.int64)[sources]
    for number, weight in enumerate(weights):
        mine = np.flatnonzero(sources == number)
        random = np.random.Generator(np.random.PCG64([seed, number]))
        times[random.permutation(mine)[: round((weight - int(weight)) * len(mine))]] += 1
    return np.repeat(np.arange(len(sources), dtype=np.int64), times)


def _check_attributes(gathered: Gathered, config: TrainConfig) -> None:
    wanted = ", ".join(config.loss.attributes)
    for name, tally in zip(gathered.comparisons.source_names, gathered.tallies, strict=True):
        if wanted and not tally.num_with_attributes:
            raise ValueError(f"loss.attributes: no row of {name} has any of {wanted}")


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
    return warnings


def _measured(gathered: Gathered, index: NDArray[np.int64], tally: Tally) -> dict[str, Any]:
    """Counts and the lengths of the sequences of these comparisons, in tokens.

    `shared_fraction` is the share of their tokens that are another one's prefix: after the first
    sequence of a comparison, what all of it begins with need not be computed again.
    """
    comparisons = gathered.comparisons
    num = np.diff(comparisons.starts)
    chosen = np.zeros(len(comparisons), dtype=bool)
    chosen[index] = True
    lengths = comparisons.lengths[np.repeat(chosen, num)]
    shared = gathered.marks["shared"][index].astype(np.int64) * (num[index] - 1)
    at = np.percentile(lengths, (5, 50, 95)).astype(int) if len(lengths) else (0, 0, 0)
    return {
        **asdict(tally),
        "dropped": str(tally),
        "num_comparisons": len(index),
        "num_sequences": len(lengths),
        "num_tokens": int(lengths.sum()),
        "length_5": int(at[0]),
        "length_50": int(at[1]),
        "length_95": int(at[2]),
        "length_max": int(lengths.max(initial=0)),
        "shared_fraction": round(float(shared.sum() / max(1, lengths.sum())), 4),
    }


def _lengths(of: Mapping[str, Any]) -> str:
    return (
        f"tokens: 5 % {of['length_5']}, median {of['length_50']}, 95 % {of['length_95']}, longest "
        f"{of['length_max']}, {of['shared_fraction']:.0%} of them shared prefixes"
    )
