"""Attention over a packed forest: every way gives what each sequence alone would get."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from reward_actor.engine.attention import attend, cascade_attention, path_attention
from reward_actor.engine.attention_plan import AttentionPlan
from reward_actor.engine.forest import Forest, plan_forests

CPU = torch.device("cpu")
ids = st.lists(st.integers(0, 2), min_size=1, max_size=40)  # long, too: shared runs above 16 rows
batches = st.lists(ids, min_size=1, max_size=8)
HEADS, KEY_HEADS, WIDTH = 4, 2, 8


def tensors(forest: Forest, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(forest.num_rows, heads, WIDTH) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    query, key, value = (torch.randn(shape, generator=generator) for shape in shapes)
    return query, key, value


def expected(
    forest: Forest, query: Tensor, key: Tensor, value: Tensor, window: int | None = None
) -> Tensor:
    """Row by row, in float64, from the definition."""
    output = torch.empty(forest.num_rows, HEADS, WIDTH, dtype=torch.float64)
    for segment in range(len(forest.starts)):
        path = torch.from_numpy(forest.path_rows(segment))
        for row in range(int(forest.starts[segment]), int(forest.ends[segment])):
            seen = path[: int(forest.position_ids[row]) + 1]
            seen = seen if window is None else seen[-window:]
            for head in range(HEADS):
                keys = key[seen, head * KEY_HEADS // HEADS].double()
                weights = torch.softmax(keys @ query[row, head].double() / WIDTH**0.5, dim=0)
                output[row, head] = weights @ value[seen, head * KEY_HEADS // HEADS].double()
    return output


# Three levels, each long enough to be joined rather than read again.
DEEP = [[0] * 30 + [a] * 20 + [b] * 5 for a in (1, 2) for b in (0, 1, 2)] + [[0] * 30, [2] * 3]


@example(sequences=DEEP, window=None)
@example(sequences=DEEP, window=10)
@given(sequences=batches, window=st.one_of(st.none(), st.integers(1, 12)))
def test_every_row_sees_its_own_path_and_nothing_else(
    sequences: list[list[int]], window: int | None
) -> None:
    [forest] = plan_forests(sequences, 10**6)
    query, key, value = tensors(forest)
    plan = AttentionPlan(forest, CPU)
    right = expected(forest, query, key, value, window)
    for output in (
        path_attention(query, key, value, plan, window=window),
        attend(query, key, value, plan, window=window),
    ):
        torch.testing.assert_close(output.double(), right, atol=2e-6, rtol=0)


@example(sequences=DEEP)
@given(sequences=batches)
def test_the_pooled_rows_alone_get_what_they_get_among_all(sequences: list[list[int]]) -> None:
    [forest] = plan_forests(sequences, 10**6)
    query, key, value = tensors(forest)
    whole = path_attention(query, key, value, AttentionPlan(forest, CPU))
    plan = AttentionPlan(forest, CPU, pooled=True)
    assert sorted(set(forest.last_rows.tolist())) == plan.query_rows.tolist()
    rows = torch.from_numpy(plan.query_rows)
    for way in (cascade_attention, path_attention):
        output = way(query[rows], key, value, plan)
        torch.testing.assert_close(output, whole[rows], atol=2e-6, rtol=0)


@example(sequences=DEEP, pooled=False)
@example(sequences=DEEP, pooled=True)
@given(sequences=batches, pooled=st.booleans())
def test_the_joined_parts_have_the_gradients_of_the_reference(
    sequences: list[list[int]], pooled: bool
) -> None:
    [forest] = plan_forests(sequences, 10**6)
    plan = AttentionPlan(forest, CPU, pooled=pooled)
    outcomes = []
    for way in (cascade_attention, path_attention):
        query, key, value = (t.requires_grad_() for t in tensors(forest))
        output = way(query[torch.from_numpy(plan.query_rows)], key, value, plan)
        gradient = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
        outcomes.append(torch.autograd.grad(output, (query, key, value), gradient))
    for ours, reference in zip(*outcomes, strict=True):
        torch.testing.assert_close(ours, reference, atol=5e-6, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("window", [None, 10])
def test_the_mask_of_one_call_for_all_is_that_of_the_reference(
    window: int | None, pooled: bool
) -> None:
    """FlexAttention, which a CPU runs without its kernel."""
    [forest] = plan_forests(DEEP, 10**6)
    query, key, value = tensors(forest)
    plan = AttentionPlan(forest, CPU, pooled=pooled)
    query = query[torch.from_numpy(plan.query_rows)]
    right = path_attention(query, key, value, plan, window=window)
    output = attend(
        query, key, value, AttentionPlan(forest, CPU, pooled=pooled, kernel="flex"), window=window
    )
    torch.testing.assert_close(output, right, atol=2e-6, rtol=0)


# Segments of several blocks of FlexAttention's mask, and of a part of one.
WIDE = [[0] * a + [b] * c for a in (130, 256, 400) for b, c in ((1, 1), (2, 127), (3, 300))]


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("window", [None, 1, 140])
@example(sequences=WIDE)
@example(sequences=DEEP)
@given(sequences=batches)
def test_the_masks_blocks_are_those_that_are_seen(
    window: int | None, pooled: bool, sequences: list[list[int]]
) -> None:
    """Blocks that are called whole are seen by all their rows; no other one has more than those
    that are listed."""
    [forest] = plan_forests(sequences, 10**6)
    plan = AttentionPlan(forest, CPU, pooled=pooled)
    mask = plan.block_mask(window)
    seen = torch.zeros(len(plan.query_rows), forest.num_rows, dtype=torch.bool)
    for segment in range(len(forest.starts)):
        path = torch.from_numpy(forest.path_rows(segment))
        for row in range(int(forest.starts[segment]), int(forest.ends[segment])):
            place = np.flatnonzero(plan.query_rows == row)
            visible = path[: int(forest.position_ids[row]) + 1]
            for at in place:
                seen[at, visible if window is None else visible[-window:]] = True
    query, key = torch.meshgrid(*(torch.arange(n) for n in seen.shape), indexing="ij")
    nobody = torch.zeros(())
    assert torch.equal(mask.mask_mod(nobody, nobody, query, key), seen)

    def listed(counts: Tensor | None, blocks: Tensor | None) -> set[tuple[int, int]]:
        assert counts is not None
        assert blocks is not None
        pairs = zip(counts[0, 0].tolist(), blocks[0, 0].tolist(), strict=True)
        return {(row, key) for row, (n, keys) in enumerate(pairs) for key in keys[:n]}

    whole = listed(mask.full_kv_num_blocks, mask.full_kv_indices)
    partly = listed(mask.kv_num_blocks, mask.kv_indices)
    assert not whole & partly
    for row in range(-(-seen.shape[0] // 128)):
        for column in range(-(-seen.shape[1] // 128)):
            block = seen[128 * row : 128 * (row + 1), 128 * column : 128 * (column + 1)]
            if (row, column) in whole:
                assert block.all()
            elif (row, column) not in partly:
                assert not block.any()


def test_a_level_of_one_key_is_read_again_and_a_long_one_is_joined() -> None:
    system, prompts = [9], [[p] * 40 for p in (1, 2)]
    sequences = [system + p + [c] * 5 for p in prompts for c in (3, 4)]
    [forest] = plan_forests(sequences, 10**6)
    parts = AttentionPlan(forest, CPU).parts
    assert len(forest.starts) == 1 + 2 + 4
    assert len(parts) == 7 + 2  # one for each segment, one for each prompt's 41 keys
    assert sum(isinstance(part.keys, Tensor) for part in parts) == 2 + 2


def test_the_shared_prefix_gets_the_gradient_of_every_sequence() -> None:
    """Packed and one row a sequence: the same loss, the same gradients."""
    sequences = [[5] * 20 + tail for tail in ([1, 2, 3], [1, 4], [6])]
    [forest] = plan_forests(sequences, 10**6)
    packed = [t.requires_grad_() for t in tensors(forest)]
    plan = AttentionPlan(forest, CPU)
    attend(*packed, plan)[torch.from_numpy(forest.last_rows)].square().sum().backward()
    alone = [t.detach().clone().requires_grad_() for t in packed]
    for segment in forest.last_segments:
        rows = torch.from_numpy(forest.path_rows(int(segment)))
        query, key, value = (t[rows].transpose(0, 1)[None] for t in alone)
        output = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=True
        )
        output[0, :, -1].square().sum().backward()
    for ours, theirs in zip(packed, alone, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("pooled", [False, True])
@given(sequences=batches)
def test_runs_line_up_queries_with_the_end_of_their_keys(
    pooled: bool, sequences: list[list[int]]
) -> None:
    """What the CUDA kernel is given: cumulative counts, each run's last query at its last key."""
    [forest] = plan_forests(sequences, 10**6)
    plan = AttentionPlan(forest, CPU, pooled=pooled)
    end = 0
    for runs in plan.runs:
        assert runs.queries.start == end
        end = runs.queries.stop
        cu_queries, cu_keys = runs.cu_queries.tolist(), runs.cu_keys.tolist()
        assert cu_queries[-1] == end - runs.queries.start
        assert cu_keys[-1] == len(runs.key_rows)
        assert runs.cu_queries.dtype == runs.cu_keys.dtype == torch.int32
        for run in range(len(cu_queries) - 1):
            rows = plan.query_rows[runs.queries][cu_queries[run] : cu_queries[run + 1]]
            keys = runs.key_rows[cu_keys[run] : cu_keys[run + 1]]
            assert keys[-len(rows) :].tolist() == rows.tolist()
            assert len(rows) <= runs.max_queries
            assert len(keys) <= runs.max_keys
            assert torch.from_numpy(forest.position_ids)[keys].tolist() == list(range(len(keys)))
    assert end == len(plan.query_rows)


def test_gathered_keys_are_bounded_by_the_rows() -> None:
    """64 short completions on a long prompt: their paths are 40 times the rows."""
    prompt = [0] * 200
    [forest] = plan_forests([[*prompt, 1 + c, 1] for c in range(64)], 10**6)
    parts = AttentionPlan(forest, CPU).runs
    assert len(parts) > 1
    assert max(len(part.key_rows) for part in parts) <= 8 * forest.num_rows + 202
    query, key, value = tensors(forest)
    plan = AttentionPlan(forest, CPU)
    torch.testing.assert_close(
        path_attention(query, key, value, plan), cascade_attention(query, key, value, plan)
    )


@pytest.mark.parametrize("trained", [0, 1, 2])
def test_one_of_queries_keys_and_values_is_enough_to_need_gradients(trained: int) -> None:
    """As when an adapter trains one projection alone."""
    [forest] = plan_forests(DEEP, 10**6)
    plan = AttentionPlan(forest, CPU)
    heads, same = tensors(forest), tensors(forest)
    heads[trained].requires_grad_()
    same[trained].requires_grad_()
    attend(*heads, plan).square().sum().backward()
    path_attention(*same, plan).square().sum().backward()
    torch.testing.assert_close(heads[trained].grad, same[trained].grad)
