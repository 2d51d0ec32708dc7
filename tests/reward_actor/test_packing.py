"""Padded batches: every sequence once, within the budget."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward_actor.engine.packing import plan_batches


@given(st.lists(st.integers(1, 300), max_size=60), st.integers(1, 1000))
def test_a_plan_holds_every_sequence_once_within_the_budget(
    lengths: list[int], budget: int
) -> None:
    plan = plan_batches(lengths, budget)
    assert sorted(index for batch in plan for index in batch) == list(range(len(lengths)))
    for batch in plan:
        padded = len(batch) * max(lengths[index] for index in batch)
        assert padded <= budget or len(batch) == 1


def test_a_budget_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="max_batch_tokens is 0"):
        plan_batches([1], 0)
