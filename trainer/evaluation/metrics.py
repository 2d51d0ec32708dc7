"""What rewards say about comparisons: accuracy, margins, calibration, length. NumPy only.

Shapes: C comparisons, S sequences, A attributes, P pairs (every two sequences of a comparison whose
scores differ; a ranking of K has up to K (K - 1) / 2). Every pair counts once. Sums run in the
order of the values, in float64, so no result depends on the order of the comparisons.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.data.comparisons import Comparisons
from trainer.evaluation.intervals import Estimate, estimate

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Indices = NDArray[np.int64]

NUM_BINS = 10
_RENAMED = {
    "reward_margin": "raw_margin",
    "min_reward": "min_raw_score",
    "mean_reward": "mean_raw_score",
    "max_reward": "max_raw_score",
}
_HIGHER = (
    "accuracy", "accuracy_low", "accuracy_high", "accuracy_shorter", "accuracy_longer",
    "raw_margin", "min_raw_score", "mean_raw_score", "max_raw_score",
)  # fmt: skip
_LOWER = ("log_loss", "calibration_error")
_OF_REWARDS = ("reward_margin", "min_reward", "mean_reward", "max_reward")
RMSE = "rmse_"
"""Before the name of an attribute: the root mean squared error of its head."""


@dataclass(frozen=True)
class CalibrationBin:
    """The pairs with low < confidence <= high (the first bin has 0.5 too); None without any."""

    low: float
    high: float
    num_pairs: int
    confidence: float | None
    """The mean of sigmoid(|raw_margin|)."""
    accuracy: float | None


@dataclass(frozen=True)
class SubsetResult:
    num_pairs: int
    num_prompts: int
    accuracy: float
    reward_margin: float | None
    raw_margin: float


@dataclass(frozen=True)
class BaselineResult:
    """A baseline's accuracy, and by how much that of the model is above it: see `difference`."""

    accuracy: float
    lead: Estimate


@dataclass(frozen=True)
class EvalResult:
    """What `evaluate` found. None is a number that is not defined for these comparisons.

    A reward is normalised, a raw score is not; what is said of probabilities is of raw scores.
    """

    num_pairs: int
    num_ties: int
    """Pairs with equal scores (labelled as ties): no other number counts them."""
    accuracy: float
    """How often the chosen side has the higher reward; equal rewards count half."""
    accuracy_low: float
    """Its 95 % interval and standard error, resampled by prompt: see `estimate`."""
    accuracy_high: float
    accuracy_stderr: float
    num_prompts: int
    """What the pairs are about; `Comparison.key` says what counts as one prompt."""
    reward_margin: float | None
    """The mean of reward_chosen - reward_rejected; None, as all of rewards, where there are raw
    scores alone: while a training runs, there is no normalisation yet."""
    min_reward: float | None
    mean_reward: float | None
    """Over all S sequences, each once; as the two others, and those of raw scores."""
    max_reward: float | None
    raw_margin: float
    """The mean of raw_chosen - raw_rejected."""
    min_raw_score: float
    mean_raw_score: float
    max_raw_score: float
    log_loss: float
    """The mean of -log sigmoid(raw_chosen - raw_rejected)."""
    calibration_error: float
    """ECE of sigmoid(raw_chosen - raw_rejected), see `_calibration`."""
    num_calibration_bins: int
    """The bins that any pair fell into: few of them tell little."""
    length_correlation: float | None
    """Pearson's, of reward and number of tokens (prompt and completion), over all S sequences."""
    num_shorter: int
    """Pairs whose chosen side has fewer tokens than the rejected one."""
    accuracy_shorter: float | None
    num_longer: int
    accuracy_longer: float | None
    calibration_bins: tuple[CalibrationBin, ...] = field(repr=False)
    subsets: dict[str, SubsetResult] = field(repr=False)
    """By name; rows without a named subset are in none."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON; rewards and `subsets` only where there are some."""
        values = {**asdict(self), "calibration_bins": [asdict(b) for b in self.calibration_bins]}
        if not self.subsets:
            del values["subsets"]
        if self.reward_margin is None:
            for of in (values, *values.get("subsets", {}).values()):
                for name in _OF_REWARDS:
                    of.pop(name, None)
        return values


def evaluate(
    comparisons: Comparisons,
    raw_scores: NDArray[Any],
    rewards: NDArray[Any] | None = None,
    seed: int = 0,
) -> EvalResult:
    """Compare raw scores (S,), and the rewards (S,) that they become, with what is known about
    their sequences; `seed` is the bootstrap's.

    The rewards decide which side is ahead, the raw scores where there are no rewards: of one model
    both say the same, of an ensemble they need not. The trained probabilities are those of
    differences of raw scores.

    Raises ValueError for numbers that are not finite, and without pairs.
    """
    raw = _checked(comparisons, raw_scores, "raw score")
    reward = None if rewards is None else _checked(comparisons, rewards, "reward")
    chosen, rejected, comparison = pair_indices(comparisons)
    if not len(chosen):
        raise ValueError("there is no pair to evaluate")
    deciding = raw if reward is None else reward
    raw_margin, margin = (of[chosen] - of[rejected] for of in (raw, deciding))
    points = _points(margin)
    right = estimate(points, comparisons.prompts[comparison], seed=seed)
    lengths = comparisons.lengths
    shorter, longer = lengths[chosen] < lengths[rejected], lengths[chosen] > lengths[rejected]
    error, bins = _calibration(raw_margin, _points(raw_margin))
    return EvalResult(
        num_pairs=len(chosen),
        num_ties=_num_possible_pairs(comparisons) - len(chosen),
        accuracy=right.mean,
        accuracy_low=right.low,
        accuracy_high=right.high,
        accuracy_stderr=right.stderr,
        num_prompts=right.num_prompts,
        reward_margin=None if reward is None else _mean(margin),
        min_reward=None if reward is None else float(reward.min()),
        mean_reward=None if reward is None else _mean(reward),
        max_reward=None if reward is None else float(reward.max()),
        raw_margin=_mean(raw_margin),
        min_raw_score=float(raw.min()),
        mean_raw_score=_mean(raw),
        max_raw_score=float(raw.max()),
        log_loss=_mean(np.logaddexp(0.0, -raw_margin)),
        calibration_error=error,
        num_calibration_bins=sum(b.num_pairs > 0 for b in bins),
        length_correlation=_correlation(deciding, lengths.astype(np.float64)),
        num_shorter=int(shorter.sum()),
        accuracy_shorter=_mean(points[shorter]) if shorter.any() else None,
        num_longer=int(longer.sum()),
        accuracy_longer=_mean(points[longer]) if longer.any() else None,
        calibration_bins=bins,
        subsets=_by_subset(
            comparisons, comparison, points, None if reward is None else margin, raw_margin
        ),
    )


def _checked(comparisons: Comparisons, values: NDArray[Any], what: str) -> Floats:
    wide: Floats = np.asarray(values, dtype=np.float64)
    if wide.shape != (comparisons.num_sequences,):
        raise ValueError(f"{what}s have the shape {wide.shape}, not ({comparisons.num_sequences},)")
    for index in np.flatnonzero(~np.isfinite(wide)):
        raise ValueError(f"the {what} of sequence {index} is {wide[index]}, not finite")
    return wide


def accuracy(comparisons: Comparisons, rewards: NDArray[Any]) -> Estimate:
    """Of rewards (S,): as `evaluate` has it, without anything else."""
    comparison = pair_indices(comparisons)[2]
    return estimate(_points_of(comparisons, rewards), comparisons.prompts[comparison])


def difference(
    comparisons: Comparisons, rewards: NDArray[Any], others: NDArray[Any], seed: int = 0
) -> Estimate:
    """By how much the rewards (S,) of one model have a higher accuracy than those of another one.

    Paired: both models get the same prompts in every resample. Raises ValueError without pairs.
    """
    comparison = pair_indices(comparisons)[2]
    if not len(comparison):
        raise ValueError("there is no pair to compare by")
    apart = _points_of(comparisons, rewards) - _points_of(comparisons, others)
    return estimate(apart, comparisons.prompts[comparison], (-1.0, 1.0), seed)


def compare_with_baselines(
    comparisons: Comparisons, rewards: NDArray[Any], baselines: Mapping[str, NDArray[Any]]
) -> dict[str, BaselineResult]:
    """The rewards (S,) of a model compared with those of each baseline, by its name."""
    return {
        name: BaselineResult(accuracy(comparisons, of).mean, difference(comparisons, rewards, of))
        for name, of in baselines.items()
    }


def measure(
    comparisons: Comparisons,
    scores: NDArray[Any],
    attributes: Mapping[str, float],
    rewards: NDArray[Any] | None = None,
) -> dict[str, Any]:
    """The raw scores (S,) of one head, or (S, A) of one for each of `attributes`, given with its
    weight -> the metrics of `evaluate`, with the rewards (S,) if they are known, if there is a
    pair, and the error of every head that there is a number for, as `rmse_NAME`. Empty if nothing
    of this is defined."""
    result: dict[str, Any] = {}
    if len(pair_indices(comparisons)[0]):
        result = evaluate(comparisons, folded(scores, attributes), rewards).as_dict()
    for index, name in enumerate(attributes):
        target = comparisons.attributes[:, index].astype(np.float64)
        known = ~np.isnan(target)
        if known.any():
            head = scores.reshape(len(target), -1)[:, index]
            result[RMSE + name] = math.sqrt(_mean((head[known] - target[known]) ** 2))
    return result


def folded(scores: NDArray[Any], attributes: Mapping[str, float]) -> NDArray[np.float32]:
    """The raw scores of every head -> (S,) raw scores of the model, their weighted sum."""
    weights = np.array(list(attributes.values()) or [1.0], dtype=np.float32)
    raw_scores: NDArray[np.float32] = (scores.reshape(-1, len(weights)) * weights).sum(axis=1)
    return raw_scores


def is_defined(metric: str, comparisons: Comparisons, attributes: Iterable[str]) -> bool:
    """Whether these comparisons hold what the metric is about: a pair, one whose chosen side is the
    shorter or the longer one, or a known attribute."""
    if metric.startswith(RMSE):
        index = list(attributes).index(metric.removeprefix(RMSE))
        return not np.isnan(comparisons.attributes[:, index]).all()
    chosen, rejected, _ = pair_indices(comparisons)
    lengths = np.diff(comparisons.offsets)
    if metric == "accuracy_shorter":
        return bool((lengths[chosen] < lengths[rejected]).any())
    if metric == "accuracy_longer":
        return bool((lengths[chosen] > lengths[rejected]).any())
    return len(chosen) > 0


def is_measurable(comparisons: Comparisons) -> bool:
    """Whether `measure` finds anything: a pair, or any known attribute."""
    has_attributes = not np.isnan(comparisons.attributes).all()
    return has_attributes or len(pair_indices(comparisons)[0]) > 0


def pair_indices(comparisons: Comparisons) -> tuple[Indices, Indices, Indices]:
    """Every pair of sequences with different scores in one comparison, ordered by them.

    Returns (P,) the chosen sequence, (P,) the rejected one, (P,) their comparison.
    """
    sizes = np.diff(comparisons.starts)
    owner = np.repeat(np.arange(len(sizes)), sizes)
    # A sequence is paired with all that follow it in its comparison: scores never rise there.
    following = comparisons.starts[1:][owner] - np.arange(len(owner)) - 1
    chosen = np.repeat(np.arange(len(owner)), following)
    first = np.cumsum(following) - following
    rejected = chosen + 1 + np.arange(len(chosen)) - first[chosen]
    differ = comparisons.scores[chosen] != comparisons.scores[rejected]
    chosen, rejected = chosen[differ], rejected[differ]
    return chosen, rejected, owner[chosen]


def check_metric(name: str, attributes: Iterable[str] = ()) -> None:
    """Raise ValueError, with the list, unless checkpoints can be ordered by this metric."""
    lower = [*_LOWER, *(RMSE + attribute for attribute in attributes)]
    if name in _RENAMED:
        raise ValueError(f"a training measures raw scores: {name} is called {_RENAMED[name]}")
    if name not in (*_HIGHER, *lower):
        raise ValueError(
            f"unknown metric {name!r}; metrics are {', '.join(_HIGHER)} (higher is better) and "
            f"{', '.join(lower)} (lower is better)"
        )


def better(metric: str, new: float | None, old: float | None) -> bool:
    """Whether `new` is strictly better than `old`; None, an undefined number, is worse than any.

    Raises ValueError as `check_metric` does.
    """
    is_error = metric.startswith(RMSE)
    if not is_error:
        check_metric(metric)
    if new is None or old is None:
        return new is not None
    return new < old if is_error or metric in _LOWER else new > old


def _points_of(comparisons: Comparisons, rewards: NDArray[Any]) -> Floats:
    chosen, rejected, _ = pair_indices(comparisons)
    return _points(rewards[chosen].astype(np.float64) - rewards[rejected])


def _points(margin: Floats) -> Floats:
    """1 where chosen is ahead, 0 where rejected is, 1/2 for equal rewards."""
    points: Floats = (np.sign(margin) + 1) / 2
    return points


def _mean(values: Floats) -> float:
    return _sum(values) / len(values)


def _sum(values: Floats) -> float:
    return float(np.sort(values).sum())  # faster than math.fsum, and as blind to their order


def _num_possible_pairs(comparisons: Comparisons) -> int:
    sizes = np.diff(comparisons.starts)
    return int((sizes * (sizes - 1) // 2).sum())


def _calibration(margin: Floats, points: Floats) -> tuple[float, tuple[CalibrationBin, ...]]:
    """The expected calibration error over equal-width bins (Guo et al., arXiv:1706.04599, eq. 3).

    The prediction is the side with the higher reward; its confidence, sigmoid(|margin|), lies in
    [0.5, 1]. A tie is a prediction that is half right with the confidence 0.5.
    """
    confidence = 1 / (1 + np.exp(-np.abs(margin)))
    width = 0.5 / NUM_BINS
    of_pair = np.clip(np.ceil((confidence - 0.5) / width).astype(np.int64) - 1, 0, NUM_BINS - 1)
    bins, errors = [], []
    for index in range(NUM_BINS):
        members = of_pair == index
        count = int(members.sum())
        sure = _mean(confidence[members]) if count else None
        right = _mean(points[members]) if count else None
        low, high = 0.5 + width * index, 0.5 + width * (index + 1)
        bins.append(CalibrationBin(round(low, 4), round(high, 4), count, sure, right))
        if sure is not None and right is not None:
            errors.append(count / len(margin) * abs(right - sure))
    return sum(errors), tuple(bins)


def _correlation(x: Floats, y: Floats) -> float | None:
    """Pearson's correlation; None where one of them is constant."""
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    x, y = x - _mean(x), y - _mean(y)
    spread = math.sqrt(_sum(x * x)) * math.sqrt(_sum(y * y))
    return max(-1.0, min(1.0, _sum(x * y) / spread)) if spread else None


def rank_correlation(
    comparisons: Comparisons, rewards: NDArray[Any], others: NDArray[Any]
) -> float | None:
    """Spearman's, of two models' rewards (S,) less the mean of their comparison: what is added to
    all rewards of a prompt decides no pair. Equal values share the mean of their ranks; None where
    one model's are all equal."""
    owner = np.repeat(np.arange(len(comparisons)), np.diff(comparisons.starts))
    centred = [
        of - (np.bincount(owner, of) / np.bincount(owner))[owner] for of in (rewards, others)
    ]
    # What is equal but for the rounding of its mean is equal.
    return _correlation(*(_ranks(of.astype(np.float32)) for of in centred))


def _ranks(values: NDArray[Any]) -> Floats:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: Floats = (np.cumsum(counts) - (counts - 1) / 2)[place]
    return ranks


def _by_subset(
    comparisons: Comparisons,
    comparison: Indices,
    points: Floats,
    reward_margin: Floats | None,
    raw_margin: Floats,
) -> dict[str, SubsetResult]:
    subset = comparisons.subsets[comparison]
    order = np.argsort(subset, kind="stable")
    present, begins = np.unique(subset[order], return_index=True)
    results = {}
    for number, members in zip(present, np.split(order, begins[1:]), strict=True):
        name = comparisons.subset_names[number]
        if name:
            results[name] = SubsetResult(
                len(members),
                len(np.unique(comparisons.prompts[comparison[members]])),
                _mean(points[members]),
                None if reward_margin is None else _mean(reward_margin[members]),
                _mean(raw_margin[members]),
            )
    return dict(sorted(results.items()))
