"""What travels together: nothing lost, nothing divided without need, shared prefixes once."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from id_groups import Groups, groups_of_ids

from reward_actor.engine.forest import plan_forests
from serve.ingress.cutting import Cut, cut, fitting


@given(groups_of_ids, st.integers(1, 60))
def test_cutting_keeps_every_sequence_and_divides_no_group_that_fits(
    groups: Groups, budget: int
) -> None:
    pieces = cut([Cut.of(group) for group in groups if group], budget)
    assert [s for piece in pieces for s in piece.sequences] == [s for g in groups for s in g]
    for piece in pieces:
        assert piece.num_tokens <= budget or len(piece.sequences) == 1
        [forest] = plan_forests(piece.sequences, 10**9)
        assert piece.num_tokens >= forest.num_rows, "never fewer than are computed"
    starts = {0}
    for group in groups:
        starts.add(max(starts) + len(group))
    first = 0
    place = 0
    ranges = [(place := place + len(p.sequences)) for p in pieces]
    for group in groups:
        inside = [end for end in ranges if first < end < first + len(group)]
        assert not inside or Cut.of(group).num_tokens > budget
        first += len(group)


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), min_size=1, max_size=5))
def test_what_all_share_is_counted_once(group: list[list[int]]) -> None:
    whole = Cut.of(group)
    shared = whole.num_shared
    assert all(sequence[:shared] == group[0][:shared] for sequence in group)
    assert whole.num_tokens == shared + sum(len(sequence) - shared for sequence in group)


singles = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=12), min_size=1, max_size=12)


@given(singles, st.integers(1, 60))
def test_what_goes_together_fits_and_the_first_is_among_it(
    sequences: list[list[int]], budget: int
) -> None:
    cuts = [Cut.of([sequence]) for sequence in sequences]
    places, num_tokens = fitting(cuts, budget)
    assert places[0] == 0
    assert places == sorted(set(places))
    assert num_tokens <= budget or places == [0]
    [forest] = plan_forests([sequences[i] for i in places], 10**9)
    assert forest.num_rows <= num_tokens <= sum(len(sequences[i]) for i in places)
    if num_tokens + max(map(len, sequences)) <= budget and num_tokens < budget / 2:
        assert len(places) == len(cuts), "nothing stays behind where there is room"


def test_completions_of_one_prompt_that_come_one_by_one_go_together() -> None:
    prompts = [[prompt] * 30 for prompt in range(4)]
    sequences = [[*prompts[i % 4], 10 + i] for i in range(16)]
    cuts = [Cut.of([sequence]) for sequence in sequences]
    places, num_tokens = fitting(cuts, 2 * (30 + 4))
    assert places == [0, 1, 4, 5, 8, 9, 12, 13]
    assert num_tokens == 2 * (30 + 4)
    for budget in (30 + 4, 2 * (30 + 4) - 1):
        assert fitting(cuts, budget) == ([0, 4, 8, 12], 30 + 4), "no prompt is divided"
    assert len(fitting(cuts, 30 + 2)[0]) == 2, "but for one that is too large"
