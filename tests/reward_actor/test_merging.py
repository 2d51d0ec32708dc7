"""How calls are divided and merged into requests."""

from __future__ import annotations

import asyncio

from hypothesis import given, settings
from hypothesis import strategies as st

from reward_actor import Group
from reward_actor.client.merging import (
    MAX_SAMPLES,
    MAX_WEIGHT,
    PendingGroups,
    divide,
    queue,
    share,
    take,
)

sizes = st.lists(st.integers(0, 1500), min_size=1, max_size=12)


@settings(deadline=None)
@given(sizes)
def test_a_call_is_divided_in_order_and_within_the_bounds(sizes: list[int]) -> None:
    groups = [Group("p", ["x"] * size) for size in sizes]
    divided = divide(groups)
    assert [group for some in divided for group in some] == groups
    for some in divided:
        assert len(some) == 1 or sum(map(len, some)) <= MAX_SAMPLES


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 800), st.booleans(), st.booleans(), st.booleans()), max_size=12
    ),
    st.integers(0, 4),
)
def test_requests_hold_every_part_once_alike_and_within_the_bounds(
    calls: list[tuple[int, bool, bool, bool]], num_endpoints: int
) -> None:
    loop = asyncio.new_event_loop()
    parts = [
        PendingGroups(
            [Group(prompt_ids=[1], completion_ids=[[2]] * n) if ids else Group("p", ["x"] * n)],
            0,
            token_rewards,
            0.0,
            loop.create_future(),
            turn_rewards,
        )
        for n, ids, token_rewards, turn_rewards in calls
    ]
    loop.close()
    waiting = queue()
    for part in parts:
        waiting.add(part)
    sent = []
    while waiting:
        oldest = next(iter(waiting))
        taken = take(waiting, share(waiting.size, num_endpoints))
        assert taken[0] is oldest
        assert all(part.is_like(taken[0]) for part in taken)
        assert len({(part.token_rewards, part.turn_rewards) for part in taken}) == 1
        assert len(taken) == 1 or sum(part.num_samples for part in taken) <= MAX_SAMPLES
        assert len(taken) == 1 or sum(part.weight for part in taken) <= MAX_WEIGHT
        sent += taken
    assert sorted(map(id, sent)) == sorted(map(id, parts))
