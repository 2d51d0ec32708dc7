"""Groups of token ids that share what they begin with, for hypothesis."""

from __future__ import annotations

from hypothesis import strategies as st

Groups = list[list[list[int]]]

groups_of_ids = st.lists(
    st.tuples(
        st.lists(st.integers(0, 2), max_size=6),
        st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), max_size=5),
    ).map(lambda group: [[*group[0], *completion] for completion in group[1]]),
    max_size=6,
)
