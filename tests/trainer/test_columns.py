"""A rendered block survives its way through Arrow: what comes out is what went in."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.columns import RenderedPart, from_row, to_row
from trainer.data.comparisons import Comparison, Comparisons
from trainer.data.render import MARK, Block, Tally

NAMES = ("a.jsonl", "b.parquet")
# Digests may end in zeros, and hold some; texts may hold what has no UTF-8.
digests = st.binary(min_size=16, max_size=16) | st.just(bytes(8) + b"x" + bytes(7))
texts = st.text(st.characters() | st.sampled_from("\ud800\x00é"))
numbers = st.floats(width=32, allow_infinity=False)


@st.composite
def parts(draw: st.DrawFn, num_attributes: int) -> RenderedPart:
    items, marks = [], []
    source = draw(st.integers(0, 1))
    for row in range(draw(st.integers(0, 5))):
        ids = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=6)
        sequences = draw(st.lists(ids, min_size=1, max_size=4))
        known = draw(st.booleans())
        items.append(
            Comparison(
                sequences=sequences,
                scores=[draw(numbers) for _ in sequences],
                key="",
                margin=draw(numbers),
                attributes=[[draw(numbers) for _ in range(num_attributes)] for _ in sequences]
                if known
                else (),
                row=row + 1,
                source=source,
                subset=draw(texts),
            )
        )
        pair = draw(digests | st.just(b""))
        marks.append((draw(digests), draw(digests), pair, draw(st.booleans()), row))
    tally = Tally(*(draw(st.integers(0, 10**9)) for _ in fields(Tally)))
    bad = draw(st.lists(st.tuples(st.integers(1, 10**12), texts), max_size=3))
    comparisons = Comparisons.of(items, NAMES, num_attributes)
    block = Block(comparisons, np.array(marks, dtype=MARK), tally, bad)
    return RenderedPart(source, draw(st.integers(0, 1000)), block, draw(texts))


def values(part: RenderedPart) -> dict[str, Any]:
    """Bytes and dtypes of the arrays, and everything else as it is."""
    everything = asdict(part)
    block = everything.pop("block")
    flat = everything | block | block["comparisons"]
    del flat["comparisons"]
    return {
        name: (value.dtype, value.shape, value.tobytes())
        if isinstance(value, np.ndarray)
        else value
        for name, value in flat.items()
    }


@pytest.mark.parametrize("num_attributes", [0, 2])
@given(data=st.data())
def test_what_comes_out_is_what_went_in(num_attributes: int, data: st.DataObject) -> None:
    sent = data.draw(st.lists(parts(num_attributes), min_size=1, max_size=3))
    table = pa.concat_tables(map(to_row, sent))  # as Ray puts rows together
    assert table.num_rows == len(sent)
    for some in (table, table.combine_chunks()):
        rows = some.to_batches(max_chunksize=1)
        got = [from_row(row, NAMES, num_attributes) for row in rows]
        assert list(map(values, got)) == list(map(values, sent))


def test_columns_are_numbers_texts_and_lists_of_them() -> None:
    part = RenderedPart(0, 0, Block(Comparisons.of([], NAMES), np.empty(0, MARK), Tally()))
    table = to_row(part)
    for name in ("ids", "scores", "key", "subset_names"):
        assert pa.types.is_list(table.schema.field(name).type)
    assert table.schema.field("ids").type.value_type == pa.int32()
    assert table.schema.field("key").type.value_type == pa.binary(16)
    of_one = Comparison([[1, 2], [1, 3]], (1, 0), key="a")
    marks = np.array([(b"", b"", b"", True, 1)], dtype=MARK)
    full = to_row(RenderedPart(0, 1, Block(Comparisons.of([of_one], NAMES), marks, Tally())))
    assert full.schema == table.schema, "or Ray could not put them together"


def test_nothing_that_comes_out_keeps_the_table() -> None:
    of_one = Comparison([[1, 2], [1, 3]], (1, 0), key="a")
    marks = np.zeros(1, dtype=MARK)
    part = RenderedPart(0, 1, Block(Comparisons.of([of_one], NAMES), marks, Tally()))
    [row] = to_row(part).to_batches()
    comparisons = from_row(row, NAMES, 0).block.comparisons
    for item in fields(comparisons):
        array = getattr(comparisons, item.name)
        if isinstance(array, np.ndarray):
            whole = array if array.base is None else array.base
            assert isinstance(whole, np.ndarray)
            assert whole.flags.owndata, item.name
