"""Attention by vLLM's CPU kernel: the same as ours, and only where it is whole and right."""

from __future__ import annotations

import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from families import VOCAB_SIZE, groups, make_network, transformers_own
from hypothesis import example, given
from hypothesis import strategies as st
from missing import skip_without_vllm_kernels

from reward_actor import vllm_kernels
from reward_actor.engine import attention, paged
from reward_actor.engine.attention_plan import AttentionPlan
from reward_actor.engine.engine import Engine
from reward_actor.engine.forest import plan_forests
from reward_actor.engine.paged import BLOCK, Pages
from reward_actor.model.reward_model import RewardModel

CPU = torch.device("cpu")
# Segments that begin and end on both sides of a block's border, and on it.
ids = st.lists(st.integers(0, 1), min_size=1, max_size=3 * BLOCK)
batches = st.lists(ids, min_size=1, max_size=8)
BORDERS = [
    [0] * BLOCK + [a] * b + [c]
    for a in (1, 2)
    for b in (0, BLOCK - 2, BLOCK - 1, BLOCK)
    for c in (3, 4)
]


@pytest.fixture(scope="module")
def kernel() -> None:
    """For tests that call vLLM's kernel."""
    skip_without_vllm_kernels()


@pytest.fixture
def taken(kernel: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is taken, also by processors for which ours is faster."""
    monkeypatch.setattr(paged, "is_better", lambda *_: vllm_kernels.is_here())


@example(sequences=BORDERS)
@given(sequences=batches)
def test_every_segment_reads_the_rows_of_its_path_in_their_order(
    sequences: list[list[int]],
) -> None:
    [forest] = plan_forests(sequences, 10**6)
    pages = Pages(forest)
    rows, again = (tensor.numpy() for tensor in pages.copies)
    slots = np.concatenate([pages.slots.numpy(), again])
    assert len(np.unique(slots)) == len(slots), "no slot is written twice"
    memory = np.full(pages.num_blocks * BLOCK, -1)
    memory[slots] = np.concatenate([np.arange(forest.num_rows), rows])
    for segment in range(len(forest.starts)):
        places = np.arange(int(pages.num_keys[segment]))
        blocks = pages.tables[segment].numpy()[places // BLOCK]
        seen = memory[blocks * BLOCK + places % BLOCK]
        np.testing.assert_array_equal(seen, forest.path_rows(segment))
    assert len(rows) < BLOCK * len(forest.starts)


# Query heads and key heads, as many as real models have of each to one, and another ratio.
HEADS = [(2, 2), (4, 2), (6, 2), (8, 2), (8, 1)]


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("pooled", [False, True])
@example(sequences=BORDERS, window=None, heads=(4, 2), width=128)
@example(sequences=BORDERS, window=40, heads=(6, 2), width=80)
@given(
    sequences=batches,
    window=st.one_of(st.none(), st.integers(1, 2 * BLOCK)),
    heads=st.sampled_from(HEADS),
    width=st.sampled_from([32, 64, 80, 128]),
)
def test_a_row_gets_what_the_reference_gives_it(
    pooled: bool, sequences: list[list[int]], window: int | None, heads: tuple[int, int], width: int
) -> None:
    [forest] = plan_forests(sequences, 10**6)
    plan = AttentionPlan(forest, CPU, pooled=pooled, kernel="paged")
    draw = torch.Generator().manual_seed(0)
    shapes = [(len(plan.query_rows), heads[0]), *[(forest.num_rows, heads[1])] * 2]
    query, key, value = (torch.randn(*shape, width, generator=draw) for shape in shapes)
    right = attention.path_attention(query, key, value, plan, None, window)
    for dtype, atol in ((torch.float32, 3e-6), (torch.bfloat16, 3e-2)):
        given_ = [tensor.to(dtype) for tensor in (query, key, value)]
        for _ in range(2):  # as in the next layer, into the same blocks
            output = plan.paged(*given_, None, window)
        assert output.dtype == dtype
        # What bfloat16 rounds away of queries, keys and values is not the kernel's doing.
        rounded = [tensor.float() for tensor in given_]
        right = attention.path_attention(*rounded, plan, None, window)
        torch.testing.assert_close(output.float(), right, atol=atol, rtol=0)


@pytest.mark.usefixtures("kernel")
def test_a_large_forest_of_short_segments_is_not_mostly_padding() -> None:
    [long], [short] = (
        plan_forests(sequences, 10**6)
        for sequences in (
            [[0] * 300 + [c] * 50 for c in range(1, 80)],
            [[0] * 10 + [c] for c in range(400)],
        )
    )
    assert Pages(long).num_blocks * BLOCK < 1.5 * long.num_rows
    assert Pages(short).num_blocks * BLOCK > 10 * short.num_rows
    for forest, is_paged in ((long, True), (short, False)):
        plan = AttentionPlan(forest, CPU, kernel="paged")
        assert plan.takes_pages(torch.float32) == is_paged
        # The cascade rounds otherwise, and a reward must not change with its neighbours.
        assert plan.takes_pages(torch.bfloat16)
    query, key, value = (torch.randn(short.num_rows, heads, 32) for heads in (4, 2, 2))
    plan = AttentionPlan(short, CPU, kernel="paged")
    right = attention.path_attention(query, key, value, plan)
    torch.testing.assert_close(attention.attend(query, key, value, plan), right)


@pytest.mark.usefixtures("taken")
def test_in_bfloat16_a_reward_is_the_same_among_short_and_long_neighbours() -> None:
    generate = random.Random(0)

    def some(count: int) -> list[int]:
        return [generate.randrange(VOCAB_SIZE) for _ in range(count)]

    scored = Engine(RewardModel(make_network("llama").bfloat16()).eval())
    assert scored.path == "forest in blocks, paged"
    ours = [some(60), some(3)]
    prompt = some(20)
    short = [prompt + some(1) for _ in range(400)]
    long = [some(200) for _ in range(3)]
    alone = np.concatenate([scored.raw_scores([each]) for each in ours])
    for neighbours in (short, long):
        together = scored.raw_scores([*ours, *neighbours])[: len(ours)]
        np.testing.assert_allclose(together, alone, atol=2e-2, rtol=0)


@pytest.mark.usefixtures("taken")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_probe_compares_what_the_kernel_gives(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """A fault that shows only where several sequences share a prefix."""
    own = Pages.copies.func  # type: ignore[attr-defined]

    def none(self: Pages) -> tuple[torch.Tensor, torch.Tensor]:
        rows, slots = own(self)
        return rows[:0], slots[:0]

    monkeypatch.setattr(Pages, "copies", property(none))
    found = Engine(RewardModel(make_network("llama").to(dtype)).eval())
    assert found.path == "forest in blocks"
    assert "paged: hidden states differ" in (found.fallback_reason or "")


@pytest.mark.usefixtures("kernel")
def test_it_has_no_gradients_and_is_not_asked_for_any() -> None:
    [forest] = plan_forests([[0] * 40, [0] * 20 + [1] * 20], 10**6)
    plan = AttentionPlan(forest, CPU, kernel="paged")
    query, key, value = (
        torch.randn(forest.num_rows, heads, 32, requires_grad=True) for heads in (4, 2, 2)
    )
    attention.attend(query, key, value, plan).sum().backward()
    assert query.grad is not None
    assert query.grad.abs().max() > 0


@pytest.mark.usefixtures("taken")
def test_several_engines_at_once_share_the_one_scratchpad() -> None:
    sequences = groups(seed=1)
    engines = [
        Engine(RewardModel(make_network("llama", num_attention_heads=heads)).eval())
        for heads in (2, 4)
    ]
    assert all("paged" in each.path for each in engines)
    assert AttentionPlan(plan_forests(sequences, 10**6)[0], CPU, kernel="paged").takes_pages(
        torch.float32
    )
    alone = [each.raw_scores(sequences) for each in engines]
    with ThreadPoolExecutor(4) as threads:
        together = threads.map(lambda i: engines[i % 2].raw_scores(sequences), range(8))
        for number, scores in enumerate(together):
            np.testing.assert_array_equal(scores, alone[number % 2])


@pytest.mark.usefixtures("taken")
@pytest.mark.parametrize("broken", ["wrong", "raises", "not here"])
def test_without_the_kernel_the_path_is_the_one_before(
    monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    right = Engine(RewardModel(make_network("llama")).eval())
    assert right.path == "forest in blocks, paged"
    sequences = groups(seed=2)
    own = transformers_own(right.model, sequences)
    np.testing.assert_allclose(right.raw_scores(sequences)[:, 0], own, atol=1e-5, rtol=0)
    if broken == "not here":
        monkeypatch.setattr(vllm_kernels, "is_here", lambda: False)
        monkeypatch.setattr(paged, "is_here", lambda: False)
    else:

        def attend(self: object, query: torch.Tensor, *others: object) -> torch.Tensor:
            if broken == "raises":
                raise RuntimeError("the kernel has failed")
            return query

        monkeypatch.setattr(paged.PagedAttention, "__call__", attend)
    found = Engine(right.model)
    assert found.path == "forest in blocks"
    if broken == "not here":
        assert found.fallback_reason is None
    else:
        assert (found.fallback_reason or "").startswith("forest in blocks, paged: ")
    np.testing.assert_allclose(found.raw_scores(sequences)[:, 0], own, atol=1e-5, rtol=0)


BOTH = """
import torch
from reward_actor.vllm_kernels import is_here
def ours(): assert is_here()
def vllms():
    from vllm.platforms import current_platform
    current_platform.import_kernels()
for load in ({order}): load()
from vllm import _custom_ops
ones = torch.ones(2, dtype=torch.int32)
_custom_ops.cpu_attn_get_scheduler_metadata(
    1, 4, 2, 32, ones[:1], torch.float32, torch.tensor([0, 1], dtype=torch.int32), True, -1, "vec",
    False,
)
"""


@pytest.mark.long
@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("order", ["ours, vllms", "vllms, ours"])
def test_a_process_may_use_vllm_too(order: str) -> None:
    """Its library is then loaded twice, in either order."""
    done = subprocess.run(
        [sys.executable, "-c", BOTH.format(order=order)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
