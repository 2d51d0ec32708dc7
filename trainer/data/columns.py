"""Rendered blocks as rows of Arrow columns, which is how Ray Data carries them, and back. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from trainer.data.comparisons import Comparisons
from trainer.data.render import MARK, Block, Tally

if TYPE_CHECKING:
    from numpy.typing import NDArray

_ARRAYS = [item.name for item in fields(Comparisons) if str(item.type).startswith("NDArray")]
_MARKS = MARK.names or ()


@dataclass(frozen=True)
class RenderedPart:
    """What a task returns, again and again; rows are numbered from 1 in each part."""

    source: int
    num_lines: int
    block: Block
    failure: str = ""
    """Why the block is empty and no further part follows: a file that cannot be read."""


def to_row(part: RenderedPart) -> pa.Table:
    """One row: its counts as integers; each array, digests and texts included, as a list."""
    block, comparisons = part.block, part.block.comparisons
    counts = {"source": part.source, "num_lines": part.num_lines, **asdict(block.tally)}
    arrays = {name: getattr(comparisons, name).ravel() for name in _ARRAYS}
    arrays |= {name: block.marks[name] for name in _MARKS}
    arrays["bad_lines"] = np.array([line for line, _ in block.bad], dtype=np.int64)
    texts = {
        "bad_reasons": [why for _, why in block.bad],
        "subset_names": comparisons.subset_names,
        "failure": [part.failure],
    }
    columns = {name: _array(values) for name, values in arrays.items()}
    columns |= {name: _texts(values) for name, values in texts.items()}
    lists = {name: pa.ListArray.from_arrays([0, len(of)], of) for name, of in columns.items()}
    return pa.table({name: [count] for name, count in counts.items()} | lists)


def from_row(
    row: pa.RecordBatch, source_names: tuple[str, ...], num_attributes: int
) -> RenderedPart:
    """What `to_row` was given, copied: a view would keep its whole Ray block in memory."""

    def values(name: str) -> NDArray[Any]:
        return np.array(row[name].flatten().to_numpy(zero_copy_only=False))

    def texts(name: str) -> list[str]:
        return [text.decode("utf-8", "surrogatepass") for text in row[name][0].as_py()]

    def count(name: str) -> int:
        return int(row[name][0].as_py())

    columns: dict[str, Any] = {name: values(name) for name in _ARRAYS}
    columns["attributes"] = columns["attributes"].reshape(len(columns["scores"]), num_attributes)
    columns["subset_names"] = tuple(texts("subset_names"))
    marks = np.empty(len(columns["margins"]), dtype=MARK)
    for name in _MARKS:
        marks[name] = values(name)
    block = Block(
        Comparisons(**columns, source_names=source_names),
        marks,
        Tally(**{item.name: count(item.name) for item in fields(Tally)}),
        list(zip(values("bad_lines").tolist(), texts("bad_reasons"), strict=True)),
    )
    return RenderedPart(count("source"), count("num_lines"), block, *texts("failure"))


def _array(values: NDArray[Any]) -> pa.Array:
    """Digests are bytes of a fixed size: without it Arrow would end them at their first zero."""
    return pa.array(values, pa.binary(values.itemsize) if values.dtype.kind == "S" else None)


def _texts(values: Sequence[str]) -> pa.Array:
    """As bytes: a lone surrogate, which JSON may hold, has no UTF-8."""
    return pa.array([text.encode("utf-8", "surrogatepass") for text in values], pa.binary())
