"""The metrics of comparisons: by hand, against loops over pairs, and blind to the order."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.comparisons import Comparison, Comparisons
from trainer.evaluation.metrics import (
    EvalResult,
    better,
    check_metric,
    difference,
    evaluate,
    folded,
    is_defined,
    is_measurable,
    measure,
    pair_indices,
    rank_correlation,
)

Item = tuple[Comparison, tuple[float, ...]]
"""A comparison and the raw scores of its sequences."""


def item(
    rewards: tuple[float, ...],
    scores: tuple[float, ...] = (1.0, 0.0),
    lengths: tuple[int, ...] | None = None,
    subset: str = "",
    key: str = "k",
) -> Item:
    sizes = lengths or (3,) * len(scores)
    sequences = [[7] * size for size in sizes]
    return Comparison(sequences, scores, key, subset=subset), rewards


MEAN, STD = 0.5, 4.0


def evaluated(items: list[Item], seed: int = 0) -> EvalResult:
    """Of these raw scores, and of the rewards that they are by MEAN and STD."""
    raw = np.array([r for _, values in items for r in values], np.float32).astype(np.float64)
    return evaluate(Comparisons.of([c for c, _ in items], ["d"]), raw, (raw - MEAN) / STD, seed)


@st.composite
def items(draw: st.DrawFn) -> list[Item]:
    """Rankings of one to four with ties of scores and rewards, at least one pair among them."""
    found = [item((0.5, 0.25), lengths=(4, 2), subset="first")]
    for _ in range(draw(st.integers(0, 6))):
        size = draw(st.integers(1, 4))

        def several(values: st.SearchStrategy[float], size: int = size) -> tuple[float, ...]:
            return tuple(draw(st.lists(values, min_size=size, max_size=size)))

        scores = tuple(sorted(several(st.sampled_from([0.0, 1.0, 2.5])), reverse=True))
        rewards = several(st.sampled_from([-2.0, 0.1, 0.25, 3.0]))
        lengths = tuple(int(n) for n in several(st.integers(1, 5)))
        found.append(item(rewards, scores, lengths, draw(st.sampled_from(["", "first", "b"]))))
    return found


@given(items())
def test_every_number_is_what_a_loop_over_the_pairs_gives(found: list[Item]) -> None:
    result = evaluated(found)
    pairs = []
    ties = 0
    for comparison, rewards in found:
        reward32 = np.array(rewards, np.float32).astype(float)
        for i, j in combinations(range(len(rewards)), 2):
            if comparison.scores[i] == comparison.scores[j]:
                ties += 1
                continue
            lengths = len(comparison.sequences[i]), len(comparison.sequences[j])
            pairs.append((reward32[i] - reward32[j], lengths, comparison.subset))

    def accuracy(margins: list[float]) -> float | None:
        points = [1.0 if m > 0 else 0.5 if m == 0 else 0.0 for m in margins]
        return pytest.approx(sum(points) / len(points)) if points else None

    margins = [margin for margin, _, _ in pairs]
    shorter = [margin for margin, (a, b), _ in pairs if a < b]
    longer = [margin for margin, (a, b), _ in pairs if a > b]
    assert (result.num_pairs, result.num_ties) == (len(pairs), ties)
    assert result.accuracy == accuracy(margins)
    assert result.raw_margin == pytest.approx(sum(margins) / len(margins))
    assert result.reward_margin == pytest.approx(result.raw_margin / STD)
    log_losses = [math.log1p(math.exp(-margin)) for margin in margins]
    assert result.log_loss == pytest.approx(sum(log_losses) / len(margins))
    assert (result.num_shorter, result.accuracy_shorter) == (len(shorter), accuracy(shorter))
    assert (result.num_longer, result.accuracy_longer) == (len(longer), accuracy(longer))
    for name in ("first", "b"):
        of_name = [margin for margin, _, subset in pairs if subset == name]
        if of_name:
            assert result.subsets[name].num_pairs == len(of_name)
            assert result.subsets[name].accuracy == accuracy(of_name)
            assert result.subsets[name].raw_margin == pytest.approx(np.mean(of_name))
            assert result.subsets[name].reward_margin == pytest.approx(np.mean(of_name) / STD)
        else:
            assert name not in result.subsets
    raw = [r for _, values in found for r in values]
    assert result.min_raw_score == np.float32(min(raw))
    assert result.max_raw_score == np.float32(max(raw))
    assert result.mean_raw_score == pytest.approx(np.mean(raw), rel=1e-6, abs=1e-6)
    assert result.min_reward == (np.float32(min(raw)).astype(float) - MEAN) / STD
    assert result.mean_reward == pytest.approx((result.mean_raw_score - MEAN) / STD)
    assert result.max_reward == (np.float32(max(raw)).astype(float) - MEAN) / STD


@given(items(), st.randoms(use_true_random=False))
def test_no_number_depends_on_the_order_of_the_comparisons(
    found: list[Item], random: object
) -> None:
    other = list(found)
    random.shuffle(other)  # type: ignore[attr-defined]
    assert evaluated(other).as_dict() == evaluated(found).as_dict()


@given(items())
def test_the_result_is_plain_json_without_nan(found: list[Item]) -> None:
    values = evaluated(found).as_dict()
    assert json.loads(json.dumps(values, allow_nan=False)) == values


def test_pairs_are_ordered_by_scores_and_labelled_ties_are_none() -> None:
    ranking, _ = item((0.0,) * 4, scores=(3.0, 2.0, 2.0, 1.0))
    tie, _ = item((0.0, 0.0), scores=(1.0, 1.0))
    alone, _ = item((0.0,), scores=(0.0,))
    pair, _ = item((0.0, 0.0))
    chosen, rejected, comparison = pair_indices(Comparisons.of([alone, ranking, tie, pair], ["d"]))
    assert list(zip(chosen.tolist(), rejected.tolist(), comparison.tolist(), strict=True)) == [
        (1, 2, 1), (1, 3, 1), (1, 4, 1), (2, 4, 1), (3, 4, 1), (7, 8, 3)
    ]  # fmt: skip


def test_calibration_by_hand() -> None:
    """Guo et al., eq. 3: two pairs at sigmoid(1) = 0.7311, one right, and one wrong at 0.8808."""
    result = evaluated([item((1.0, 0.0)), item((0.0, 1.0)), item((0.0, 2.0))])
    assert result.calibration_error == pytest.approx(
        2 / 3 * abs(0.5 - 0.7310586) + 1 / 3 * 0.8807971, abs=1e-6
    )
    filled = [b for b in result.calibration_bins if b.num_pairs]
    assert [(b.low, b.high, b.num_pairs, b.accuracy) for b in filled] == [
        (0.7, 0.75, 2, 0.5), (0.85, 0.9, 1, 0.0)
    ]  # fmt: skip
    assert filled[0].confidence == pytest.approx(0.7310586, abs=1e-6)
    assert len(result.calibration_bins) == 10
    empty = result.calibration_bins[1]
    assert (empty.confidence, empty.accuracy) == (None, None)


def test_a_tie_of_rewards_is_perfectly_calibrated_and_a_sure_mistake_is_not() -> None:
    assert evaluated([item((2.0, 2.0))]).calibration_error == 0
    sure = evaluated([item((-3e38, 3e38))])
    assert sure.calibration_error == 1
    assert sure.calibration_bins[-1].num_pairs == 1
    assert sure.log_loss == pytest.approx(6e38)


def test_the_length_correlation_is_pearsons_over_all_sequences() -> None:
    found = [item((1.0, 0.0), lengths=(5, 2)), item((-1.0, 0.5), lengths=(3, 9))]
    expected = np.corrcoef([1, 0, -1, 0.5], [5, 2, 3, 9])[0, 1]
    assert evaluated(found).length_correlation == pytest.approx(expected)


@pytest.mark.parametrize(
    "found",
    [
        [item((1.0, 0.0), lengths=(4, 4)), item((0.3, 0.1), lengths=(4, 4))],
        [item((0.1, 0.1), lengths=(4, 3)), item((0.1, 0.1), lengths=(2, 4))],
    ],
)
def test_a_correlation_with_a_constant_is_not_defined(found: list[Item]) -> None:
    assert evaluated(found).length_correlation is None


def test_the_accuracy_of_no_pair_is_not_defined() -> None:
    result = evaluated([item((1.0, 0.0), lengths=(2, 3))])
    assert (result.accuracy_shorter, result.num_longer, result.accuracy_longer) == (1, 0, None)
    assert "subsets" not in result.as_dict()


def test_the_interval_is_of_prompts_and_follows_its_seed() -> None:
    generator = np.random.default_rng(0)
    # Of many sizes, or both seeds would meet on the few fractions of 30 pairs.
    found = [
        item(tuple(generator.normal(size=k)), tuple(range(k, 0, -1)), key=f"{i // 2}")
        for i, k in enumerate((2, 3, 4, 5) * 100)
    ]
    assert evaluated(found, seed=1) == evaluated(found, seed=1)
    first, second = evaluated(found, seed=1).as_dict(), evaluated(found, seed=2).as_dict()
    differ = {k for k in first if first[k] != second[k]}
    assert differ == {"accuracy_low", "accuracy_high", "accuracy_stderr"}
    assert first["num_prompts"] == 200
    assert first["accuracy_low"] < first["accuracy"] < first["accuracy_high"]
    one = evaluated([item((1.0, 0.0, 0.5), scores=(2, 1, 0))] * 9)
    assert (one.num_prompts, one.num_pairs, one.accuracy) == (1, 27, pytest.approx(2 / 3))
    assert (one.accuracy_low, one.accuracy_high) == pytest.approx(
        (2 / 3 * 0.025, 0.975 + 0.025 * 2 / 3)
    )


def test_the_bins_with_pairs_are_counted() -> None:
    assert (
        evaluated([item((1.0, 0.0)), item((0.0, 1.0)), item((0.0, 2.0))]).num_calibration_bins == 2
    )


def test_a_difference_is_paired() -> None:
    comparisons = Comparisons.of([item((0, 0), key=f"{i}")[0] for i in range(40)], ["d"])
    better = np.tile([1.0, 0.0], 40)
    worse = better.copy()
    worse[:8] = -better[:8]
    found = difference(comparisons, better, worse)
    assert found.mean == pytest.approx(0.1)
    assert 0 < found.low < 0.1 < found.high < 0.25
    assert found.stderr == pytest.approx(np.sqrt(0.1 * 0.9 / 40), rel=0.1)
    back = difference(comparisons, worse, better)
    assert back.mean == -found.mean
    alone = Comparisons.of([Comparison([[1]], (0.0,), "k")], ["d"])
    with pytest.raises(ValueError, match="no pair to compare by"):
        difference(alone, np.zeros(1), np.zeros(1))


def test_ranks_are_of_rewards_within_their_prompts() -> None:
    comparisons = Comparisons.of([item((0, 0), key=f"{i}")[0] for i in range(4)], ["d"])
    margins = np.array([1.0, -2.0, 3.0, 3.0])
    rewards = np.stack([margins, -margins], axis=1) / 2
    offsets = np.array([[100.0], [-50.0], [0.0], [7.0]])
    assert rank_correlation(comparisons, rewards.ravel(), (rewards + offsets).ravel()) == 1
    assert rank_correlation(comparisons, rewards.ravel(), (offsets - rewards).ravel()) == -1
    assert rank_correlation(comparisons, rewards.ravel(), np.ones(8)) is None
    others = rewards[[2, 1, 0, 3]]
    # 0.5, -0.5, -1, 1, 1.5, -1.5, 1.5, -1.5 against 1.5, -1.5, -1, 1, 0.5, -0.5, 1.5, -1.5
    ranks = [[5, 4, 3, 6, 7.5, 1.5, 7.5, 1.5], [7.5, 1.5, 3, 6, 5, 4, 7.5, 1.5]]
    found = rank_correlation(comparisons, rewards.ravel(), others.ravel())
    assert found == pytest.approx(np.corrcoef(*ranks)[0, 1])


def test_without_rewards_nothing_is_called_one() -> None:
    comparison, raw = item((1.0, 0.0), subset="a")
    values = evaluate(Comparisons.of([comparison], ["d"]), np.array(raw)).as_dict()
    assert not [name for of in (values, values["subsets"]["a"]) for name in of if "reward" in name]
    assert values["raw_margin"] == values["subsets"]["a"]["raw_margin"] == 1


def test_of_an_ensemble_its_rewards_decide() -> None:
    """Whose raw scores, combined, may say the opposite."""
    held = Comparisons.of([item((0.0, 0.0))[0]], ["d"])
    result = evaluate(held, np.array([0.0, 1.0]), np.array([1.0, 0.0]))
    assert (result.accuracy, result.reward_margin, result.raw_margin) == (1, 1, -1)
    assert result.log_loss == pytest.approx(np.logaddexp(0, 1))


def test_rewards_that_cannot_be_evaluated_are_refused() -> None:
    with pytest.raises(ValueError, match="no pair"):
        evaluated([item((1.0, 0.0), scores=(1, 1)), item((1.0,), scores=(0,))])
    with pytest.raises(ValueError, match="no pair"):
        evaluated([])
    with pytest.raises(ValueError, match="sequence 1 is nan"):
        evaluated([item((1.0, float("nan")))])
    with pytest.raises(ValueError, match=r"shape \(3,\), not \(2,\)"):
        evaluate(Comparisons.of([item((1.0, 0.0))[0]], ["d"]), np.zeros(3))


def test_a_metric_knows_which_way_is_better() -> None:
    assert better("accuracy", 0.6, 0.5)
    assert not better("accuracy", 0.5, 0.5)
    assert better("log_loss", 0.5, 0.6)
    assert not better("calibration_error", 0.2, 0.1)
    assert better("accuracy", 0.0, None)
    assert not better("accuracy_shorter", None, None)
    assert not better("accuracy_shorter", None, 0.1)


def test_an_unknown_metric_is_refused_with_the_list_of_them() -> None:
    for name in ("acuracy", "num_pairs", "length_correlation"):
        with pytest.raises(ValueError, match=rf"'{name}'; metrics are accuracy, .*log_loss"):
            check_metric(name)
    with pytest.raises(ValueError, match="metrics are"):
        better("acuracy", 1.0, None)


def test_every_metric_is_a_number_of_the_result() -> None:
    values = evaluated([item((1.0, 0.0), lengths=(3, 2)), item((1.0, 0.0), lengths=(2, 3))])
    with pytest.raises(ValueError, match="metrics are") as error:
        check_metric("")
    names = [word.strip(",") for word in str(error.value).split("metrics are ")[1].split()]
    metrics = [name for name in names if name in values.as_dict()]
    assert len(metrics) == 11
    for name in metrics:
        check_metric(name)
        assert isinstance(values.as_dict()[name], float)


def rated(*attributes: tuple[float, ...], scores: tuple[float, ...] = (0.0,)) -> Comparison:
    return Comparison([[7]] * len(attributes), scores, key="k", attributes=attributes)


def test_each_head_has_its_error_over_the_completions_that_have_its_attribute() -> None:
    unknown = float("nan")
    held = Comparisons.of(
        [rated((1.0, unknown)), rated((3.0, unknown), (unknown, unknown), scores=(1.0, 0.0))],
        ["d"],
        num_attributes=2,
    )
    weights = {"kind": 1.0, "brief": -0.5}
    heads = np.array([[1.5, 0], [2.0, 2.0], [0.0, 1.0]], np.float32)
    assert folded(heads, weights).tolist() == [1.5, 1.0, -0.5]
    result = measure(held, heads, weights)
    assert result["rmse_kind"] == pytest.approx(math.sqrt((0.5**2 + 1.0**2) / 2))
    assert "rmse_brief" not in result
    assert result.items() >= evaluate(held, folded(heads, weights)).as_dict().items()
    assert is_defined("rmse_kind", held, weights)
    assert not is_defined("rmse_brief", held, weights)


def test_a_single_head_may_come_as_one_row_of_scores() -> None:
    held = Comparisons.of([rated((1.0,)), rated((4.0,))], ["d"], num_attributes=1)
    assert measure(held, np.array([1.0, 2.0], np.float32), {"kind": 2.0}) == {
        "rmse_kind": pytest.approx(math.sqrt(2))
    }


def test_nothing_is_found_where_there_is_neither_a_pair_nor_an_attribute() -> None:
    tie, alone = item((0.0, 0.0), scores=(1.0, 1.0))[0], item((0.0,), scores=(0.0,))[0]
    for some in ([], [tie], [alone, tie]):
        held = Comparisons.of(some, ["d"])
        assert measure(held, np.zeros(held.num_sequences, np.float32), {}) == {}
        assert not is_measurable(held)
        assert not is_defined("accuracy", held, {})
    assert is_measurable(Comparisons.of([rated((1.0,))], ["d"], num_attributes=1))
    assert is_measurable(Comparisons.of([item((1.0, 0.0))[0]], ["d"]))


def test_checkpoints_can_be_ordered_by_the_error_of_an_attribute() -> None:
    check_metric("rmse_kind", ["kind"])
    with pytest.raises(ValueError, match=r"'rmse_rude'; metrics are .*rmse_kind \(lower"):
        check_metric("rmse_rude", ["kind"])
    assert better("rmse_kind", 0.1, 0.2)
    assert not better("rmse_kind", 0.2, 0.1)


@pytest.mark.process
def test_metrics_need_neither_torch_nor_ray() -> None:
    heavy = "{'torch', 'ray', 'transformers'}"
    code = f"import sys, trainer.evaluation.metrics; assert not {heavy} & {{*sys.modules}}"
    subprocess.run([sys.executable, "-c", code], check=True)
