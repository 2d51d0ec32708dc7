"""The reward cache: exact, bounded, and never a mixture of versions."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward_actor import Group, RewardScorer
from reward_actor.engine.cache import RewardCache, cache_key

sequences = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=3), max_size=8)


def scores_of(rows: Sequence[Sequence[int]]) -> np.ndarray:
    """(n, 2): another value for every sequence."""
    value = [sum(token * 4.0**place for place, token in enumerate(row)) for row in rows]
    return np.array([[v, len(row)] for v, row in zip(value, rows, strict=True)]).reshape(
        len(rows), 2
    ).astype(np.float32)  # fmt: skip


@given(st.lists(sequences, max_size=6), st.integers(1, 6))
def test_a_cache_changes_nothing_but_the_work(calls: list[list[list[int]]], bound: int) -> None:
    cache = RewardCache(bound)
    computed: list[int] = []
    distinct = 0

    def compute(rows: Sequence[Sequence[int]]) -> np.ndarray:
        computed.append(len(rows))
        assert len({tuple(row) for row in rows}) == len(rows), "each once"
        return scores_of(rows)

    for rows in calls:
        scores = cache.scores("a", rows, compute)
        assert scores.dtype == np.float32
        assert scores.tolist() == scores_of(rows).tolist()
        distinct += len({tuple(row) for row in rows})
        assert len(cache) <= bound
    assert cache.num_misses == sum(computed)
    assert cache.num_hits + cache.num_misses == distinct


def test_the_sequences_asked_for_last_are_kept() -> None:
    cache = RewardCache(2)
    for rows in ([[1]], [[2]], [[1]], [[3]]):  # 2 is the one that was not asked for again
        cache.scores("a", rows, scores_of)
    assert (cache.num_hits, cache.num_misses) == (1, 3)
    cache.scores("a", [[1], [3]], scores_of)
    assert cache.num_hits == 3
    cache.scores("a", [[2]], scores_of)
    assert cache.num_misses == 4


def test_a_sequence_twice_in_a_call_is_one_miss() -> None:
    cache = RewardCache(8)
    scores = cache.scores("a", [[1], [2], [1]], scores_of)
    assert scores[0].tolist() == scores[2].tolist()
    assert (cache.num_hits, cache.num_misses) == (0, 2)


def test_versions_and_sequences_do_not_mix() -> None:
    cache = RewardCache(8)
    cache.scores("a", [[1, 2]], scores_of)
    other = cache.scores("b", [[1, 2]], lambda rows: scores_of(rows) + 1)
    assert other.tolist() == (scores_of([[1, 2]]) + 1).tolist()
    assert cache.num_hits == 0
    rows = ([1, 2], [2, 1], [1], [1, 0], [0, 1], [513], [1, 2, 0])
    assert len({cache_key("a", row) for row in rows}) == len(rows)


def test_what_is_not_finite_is_computed_again() -> None:
    cache = RewardCache(8)
    for _ in range(2):
        scores = cache.scores("a", [[1]], lambda _: np.array([[math.nan, 1]], np.float32))
        assert math.isnan(scores[0, 0])
    assert (cache.num_hits, cache.num_misses, len(cache)) == (0, 2, 0)


def test_a_failed_call_leaves_nothing_behind() -> None:
    cache = RewardCache(8)

    def fail(rows: Sequence[Sequence[int]]) -> np.ndarray:
        raise RuntimeError("no device")

    with pytest.raises(RuntimeError, match="no device"):
        cache.scores("a", [[1]], fail)
    assert len(cache) == 0
    assert cache.scores("a", [[1]], scores_of).tolist() == scores_of([[1]]).tolist()


def test_threads_share_a_cache() -> None:
    cache = RewardCache(50)
    wrong: list[int] = []

    def ask(seed: int) -> None:
        generate = np.random.default_rng(seed)
        for _ in range(200):
            rows = generate.integers(0, 4, size=(6, 3)).tolist()
            if cache.scores("a", rows, scores_of).tolist() != scores_of(rows).tolist():
                wrong.append(seed)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(cache) <= 50


def test_a_bound_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="max_entries is 0"):
        RewardCache(0)


def test_a_scorer_answers_again_bit_by_bit(export_dir: Path) -> None:
    scorer = RewardScorer.from_pretrained(export_dir, "cpu")
    plain = RewardScorer.from_pretrained(export_dir, "cpu", cache_size=0)
    assert plain.cache is None
    assert scorer.cache is not None
    group = Group("Name two fruits.", ["An apple and a pear.", "A hammer.", "An apple and a pear."])
    [first] = scorer.score([group])
    assert (scorer.cache.num_hits, scorer.cache.num_misses) == (0, 2)
    assert first.rewards[0] == first.rewards[2]
    for completion, reward in zip(group.completions, first.rewards, strict=True):
        assert scorer.score([Group("Name two fruits.", [completion])])[0].rewards == [reward]
    assert (scorer.cache.num_hits, scorer.cache.num_misses) == (3, 2)
    assert plain.score([group])[0].rewards == pytest.approx(first.rewards, abs=1e-5)
    scorer.score([group], token_rewards=True)
    assert scorer.cache.num_misses == 2, "token rewards pass it by"
