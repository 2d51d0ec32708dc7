"""Common prefixes of token ids."""

from __future__ import annotations

from itertools import takewhile

from hypothesis import given
from hypothesis import strategies as st

from reward_actor.token_ids import common_prefix, in_order

ids = st.lists(st.integers(0, 3), max_size=12)  # few letters: many shared prefixes


@given(st.lists(ids, min_size=1, max_size=6))
def test_common_prefix_is_the_longest_of_all(sequences: list[list[int]]) -> None:
    columns = zip(*sequences, strict=False)
    expected = len(list(takewhile(lambda column: len(set(column)) == 1, columns)))
    assert common_prefix(*sequences) == expected
    assert common_prefix(*map(bytes, sequences)) == expected
    assert common_prefix(*("".join(map(str, each)) for each in sequences)) == expected


@given(st.lists(ids, min_size=1, max_size=12))
def test_what_is_not_shared_in_order_are_the_distinct_prefixes(sequences: list[list[int]]) -> None:
    order, shared = in_order(sequences)
    assert [sequences[place] for place in order] == sorted(sequences)
    assert sorted(order) == list(range(len(sequences)))
    prefixes = {tuple(s[: i + 1]) for s in sequences for i in range(len(s))}
    assert sum(map(len, sequences)) - sum(shared) == len(prefixes)
