"""Pooling: the last real token, on any padding side, whatever ids pad."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, engine, groups, transformers_own
from hypothesis import given
from hypothesis import strategies as st

from reward_actor.model.reward_model import (
    Float32Head,
    float32_head,
    get_reward,
    last_token_index,
)
from reward_actor.scorer import RewardScorer

PAD = 0


@pytest.fixture(scope="module")
def network(export_dir: Path) -> Any:
    return RewardScorer.from_pretrained(export_dir, "cpu").members[0].model.network


def alone(network: Any, row: list[int]) -> float:
    """The reward of one sequence without padding or mask: what every batch must reproduce."""
    with torch.inference_mode():
        hidden = network.model(torch.tensor([row]), use_cache=False).last_hidden_state
        return float(network.score(hidden[0, -1]))


def padded(rows: list[list[int]], lefts: list[int], width: int) -> tuple[Any, Any]:
    ids = torch.full((len(rows), width), PAD)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for index, (row, left) in enumerate(zip(rows, lefts, strict=True)):
        ids[index, left : left + len(row)] = torch.tensor(row)
        mask[index, left : left + len(row)] = 1
    return ids, mask


@given(data=st.data())
def test_with_a_mask_padding_and_pad_ids_in_the_text_change_nothing(
    network: Any, data: st.DataObject
) -> None:
    rows = data.draw(
        st.lists(st.lists(st.integers(0, 50), min_size=1, max_size=12), min_size=1, max_size=5)
    )  # id 0 pads, and may stand anywhere in the text, at its end, too
    width = 16
    lefts = [data.draw(st.integers(0, width - len(row))) for row in rows]
    ids, mask = padded(rows, lefts, width)
    with torch.inference_mode():
        logits, scores, last = get_reward(network, ids, PAD, 0, mask)
    assert logits.shape == ids.shape
    assert last.tolist() == [left + len(row) - 1 for left, row in zip(lefts, rows, strict=True)]
    expected = [alone(network, row) for row in rows]
    assert scores.tolist() == pytest.approx(expected, abs=1e-5)


@given(
    rows=st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=12), min_size=1, max_size=5),
    context_length=st.integers(0, 1),
)
def test_without_a_mask_right_padding_is_right(
    network: Any, rows: list[list[int]], context_length: int
) -> None:
    ids, _ = padded(rows, [0] * len(rows), 14)
    with torch.inference_mode():
        _, scores, last = get_reward(network, ids, PAD, context_length)
    assert last.tolist() == [len(row) - 1 for row in rows]
    assert scores.tolist() == pytest.approx([alone(network, row) for row in rows], abs=1e-5)


def test_without_a_mask_the_result_is_open_instructs(network: Any) -> None:
    ids = torch.tensor([[5, PAD, 7, 8], [PAD, 5, 6, 7], [5, 6, 7, 8]])
    with torch.inference_mode():
        logits, scores, last = get_reward(network, ids, PAD, 0)
    # The first pad behind a real token ends a row, inside the text, too; those in front do not.
    assert last.tolist() == [0, 3, 3]
    assert scores.tolist() == [logits[0, 0].item(), logits[1, 3].item(), logits[2, 3].item()]


def test_without_a_mask_rows_may_be_padded_on_both_sides(network: Any) -> None:
    rows = [[PAD, PAD, 5, 6, 7, PAD], [PAD, 5, 6, 7, 8, 9], [5, 6, PAD, 7, 8, PAD]]
    for context_length, expected in ((0, [4, 5, 1]), (1, [4, 5, 1]), (2, [4, 5, 4])):
        with torch.inference_mode():
            _, scores, last = get_reward(network, torch.tensor(rows), PAD, context_length)
        assert last.tolist() == expected
        assert scores[:2].tolist() == pytest.approx(
            [alone(network, [5, 6, 7]), alone(network, [5, 6, 7, 8, 9])], abs=1e-5
        )


@pytest.mark.parametrize("with_mask", [True, False])
def test_a_row_of_padding_is_named(network: Any, with_mask: bool) -> None:
    ids = torch.tensor([[5, 6], [PAD, PAD]])
    mask = (ids != PAD).long() if with_mask else None
    with pytest.raises(ValueError, match="row 1 holds only padding"):
        get_reward(network, ids, PAD, 0, mask)


@given(st.lists(st.lists(st.booleans(), min_size=6, max_size=6).filter(any), min_size=1))
def test_the_last_index_is_that_of_the_rightmost_one(rows: list[list[bool]]) -> None:
    expected = [max(i for i, real in enumerate(row) if real) for row in rows]
    assert last_token_index(torch.tensor(rows)).tolist() == expected


def test_the_head_computes_in_float32() -> None:
    torch.manual_seed(0)
    head = Float32Head.of(torch.nn.Linear(64, 1, bias=False).bfloat16())
    hidden = torch.randn(9, 64).bfloat16()
    expected = hidden.double() @ head.weight.double().T
    assert head(hidden).dtype == torch.float32
    assert torch.allclose(head(hidden).double(), expected, atol=1e-6)


@pytest.mark.parametrize("num_heads", [1, 3])
def test_equal_rows_get_equal_scores(num_heads: int) -> None:
    head = Float32Head.of(torch.nn.Linear(64, num_heads))
    row = torch.randn(64, generator=torch.Generator().manual_seed(0))
    for num_rows in range(1, 40):
        scores = head(row.expand(num_rows, 64))
        assert scores.shape == (num_rows, num_heads)
        assert (scores == scores[0]).all()


def test_a_head_that_is_not_linear_is_refused() -> None:
    with pytest.raises(ValueError, match="holds a LayerNorm"):
        float32_head(torch.nn.Sequential(torch.nn.LayerNorm(8), torch.nn.Linear(8, 1)))
    with pytest.raises(ValueError, match="is a Bilinear, not made of linear layers"):
        float32_head(torch.nn.Bilinear(8, 8, 1))


@pytest.mark.parametrize("family", FAMILIES)
def test_get_reward_needs_no_side_of_padding(family: str) -> None:
    network = engine(family).model.network
    rows = [s for s in groups(seed=5, num_groups=2) if len(s) <= 60][:6]
    width = 64
    expected = transformers_own(engine(family).model, rows)
    for left in (0.0, 1.0, 0.5):
        ids = torch.full((len(rows), width), 3)
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        for index, row in enumerate(rows):
            start = int(left * (width - len(row)))
            ids[index, start : start + len(row)] = torch.tensor(row)
            mask[index, start : start + len(row)] = 1
        with torch.inference_mode():
            logits, scores, last = get_reward(network, ids, 3, 0, mask)
        assert logits.shape == (len(rows), width)
        assert mask.gather(1, last[:, None]).all()
        np.testing.assert_allclose(scores.numpy(), expected, atol=2e-5, rtol=0)


@given(
    rows=st.lists(st.lists(st.integers(0, 3), min_size=8, max_size=8), min_size=1, max_size=4),
    context_length=st.integers(0, 8),
)
def test_without_a_mask_get_reward_is_open_instructs(
    rows: list[list[int]], context_length: int
) -> None:
    """All three results against its procedure, step by step (open_instruct/model_utils.py), but
    for pads before the completion, which it stops at."""
    pad = 3
    rows = [row for row in rows if set(row) != {pad}] or [[1] * 8]
    ids = torch.tensor(rows)
    network = engine("llama").model.network
    with torch.inference_mode():
        logits, scores, last = get_reward(network, ids, pad, context_length)
        real = ids != pad
        hidden = network.model(
            input_ids=ids * real,
            attention_mask=real,
            position_ids=real.cumsum(1) - real.long(),
            use_cache=False,
        ).last_hidden_state
        expected = network.score(hidden)[..., 0]
    for row in range(len(rows)):
        begin = next((i for i in range(context_length, 8) if rows[row][i] != pad), context_length)
        first_pad = next((i for i in range(begin, 8) if rows[row][i] == pad), 8)
        assert int(last[row]) == first_pad - 1
        torch.testing.assert_close(scores[row], expected[row, first_pad - 1], atol=1e-5, rtol=0)
        at_real = real[row]
        torch.testing.assert_close(logits[row][at_real], expected[row][at_real], atol=1e-5, rtol=0)
