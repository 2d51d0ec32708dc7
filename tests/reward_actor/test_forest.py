"""The packed forest: every prefix once, every sequence whole, every batch in its budget."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from reward_actor.engine.forest import plan_forests

ids = st.lists(st.integers(0, 3), min_size=1, max_size=12)  # few letters: many shared prefixes
batches = st.lists(ids, min_size=1, max_size=12)


def distinct_prefixes(sequences: list[list[int]]) -> int:
    return len({tuple(s[: i + 1]) for s in sequences for i in range(len(s))})


@settings(max_examples=300)
@given(sequences=batches, budget=st.integers(1, 60))
@example(sequences=[[1, 2, 3], [1, 2, 3], [1, 2], [1]], budget=60)
def test_every_sequence_is_a_path_and_no_batch_is_over_its_budget(
    sequences: list[list[int]], budget: int
) -> None:
    forests = plan_forests(sequences, budget)
    assert sorted(i for f in forests for i in f.indices) == list(range(len(sequences)))
    for forest in forests:
        members = [sequences[i] for i in forest.indices]
        assert forest.num_rows == distinct_prefixes(members)
        assert forest.num_rows <= budget or len(members) == 1
        for place, sequence in enumerate(members):
            rows = forest.path_rows(int(forest.last_segments[place]))
            assert forest.token_ids[rows].tolist() == sequence
            assert forest.position_ids[rows].tolist() == list(range(len(sequence)))
            assert rows[-1] == forest.last_rows[place]


@settings(max_examples=200)
@given(sequences=batches)
def test_segments_lie_in_preorder_without_gaps(sequences: list[list[int]]) -> None:
    [forest] = plan_forests(sequences, 10**6)
    assert forest.starts.tolist() == [0, *forest.ends.tolist()[:-1]]
    assert forest.ends[-1] == forest.num_rows
    for segment, parent in enumerate(forest.parents):
        below = [s for s in range(len(forest.starts)) if segment in forest.path(s)]
        assert forest.tree_ends[segment] == max(forest.ends[s] for s in below)
        assert below == list(range(segment, segment + len(below)))
        if parent >= 0:
            siblings = np.flatnonzero(forest.parents == parent)
            firsts = forest.token_ids[forest.starts[siblings]]
            assert len(set(firsts.tolist())) == len(siblings)  # a longest run: no two go on alike


def test_the_drawing_of_the_docstring_is_true() -> None:
    a, b, c, d, e, x, y = range(7)
    [forest] = plan_forests([[a, b, c, d, e], [a, b, c, x], [a, b, y]], 100)
    assert list(zip(forest.starts.tolist(), forest.ends.tolist(), strict=True)) == [
        (0, 2), (2, 3), (3, 5), (5, 6), (6, 7),
    ]  # fmt: skip
    assert forest.parents.tolist() == [-1, 0, 1, 1, 0]
    assert forest.position_ids.tolist() == [0, 1, 2, 3, 4, 3, 2]


def test_a_cut_falls_between_groups() -> None:
    """Four groups of three with 10 + 3 x 5 tokens; a budget of 60 holds two and a half of them."""
    groups = [[[g] * 10 + [100 + c] * 5 for c in range(3)] for g in range(4)]
    forests = plan_forests([s for group in groups for s in group], 60)
    assert [f.num_rows for f in forests] == [50, 50]


def test_a_chain_of_thousands_of_levels_needs_no_recursion() -> None:
    sequences = [list(range(i + 1)) for i in range(3000)]
    [forest] = plan_forests(sequences, 3000)
    assert forest.num_rows == 3000
    assert len(forest.path(2999)) == 3000


def test_what_cannot_be_packed_is_named() -> None:
    with pytest.raises(ValueError, match="sequence 1 is empty"):
        plan_forests([[1], []], 10)
    with pytest.raises(ValueError, match="max_batch_tokens is 0"):
        plan_forests([[1]], 0)
    assert plan_forests([], 10) == []
