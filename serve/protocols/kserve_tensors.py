"""Tensors of KServe's v2 protocol, as JSON and in the binary extension.

With the extension, a body is JSON and then the bytes of the tensors, in their order; the header
Inference-Header-Content-Length says where the JSON ends. INT64 are 8 bytes each, little-endian; an
element of BYTES is its length (uint32, little-endian) and then the bytes, UTF-8 here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import Field

from serve.protocols.drop_in import DropIn

if TYPE_CHECKING:
    from numpy.typing import NDArray

HEADER_LENGTH = "Inference-Header-Content-Length"

_UINT32, _INT64, _FP32 = np.dtype("<u4"), np.dtype("<i8"), np.dtype("<f4")

Size = Annotated[int, Field(ge=0, lt=2**40)]


class BinarySize(DropIn):
    binary_data_size: Size | None = None


class InputTensor(DropIn):
    """Its elements stand in `data`, in rows or flat, or as bytes behind the JSON."""

    name: str
    datatype: str
    shape: Annotated[list[Size], Field(min_length=1, max_length=2)]
    data: list[Any] | None = None
    parameters: BinarySize = BinarySize()


def split(body: bytes, header_length: str | None) -> tuple[bytes, bytes]:
    """A body's JSON, and the bytes behind it. Raises ValueError."""
    if header_length is None:
        return body, b""
    if not (header_length.isascii() and header_length.isdigit()):
        raise ValueError(f"{HEADER_LENGTH} must be a number of bytes")
    length = int(header_length[:20])
    if length > len(body):
        raise ValueError(f"{HEADER_LENGTH} is {length}, but the body has {len(body)} bytes")
    return body[:length], body[length:]


def raw_parts(tensors: Sequence[InputTensor], raw: bytes) -> list[bytes | None]:
    """The bytes of each tensor, None where it has its elements in JSON. Raises ValueError, which
    counts the tensors: what their names hold is the caller's."""
    parts: list[bytes | None] = []
    at = 0
    for index, tensor in enumerate(tensors):
        size = tensor.parameters.binary_data_size
        if (size is None) == (tensor.data is None):
            raise ValueError(f"input {index} must have data, or binary_data_size, and not both")
        parts.append(None if size is None else raw[at : at + size])
        at += size or 0
    if at != len(raw):
        raise ValueError(f"the tensors announce {at} bytes behind the JSON; there are {len(raw)}")
    return parts


def texts(tensor: InputTensor, raw: bytes | None) -> list[str]:
    """The elements of a BYTES tensor (B,) or (B, 1). Raises ValueError."""
    _check(tensor, "BYTES")
    if tensor.shape[1:] not in ([], [1]):
        raise ValueError(f"{tensor.name} must have the shape [B] or [B, 1]")
    found = list(_flat(tensor.data or [])) if raw is None else _texts(tensor.name, raw)
    if not all(isinstance(text, str) for text in found):
        raise ValueError(f"{tensor.name} must hold strings")
    _check_count(tensor, len(found))
    return found


def integers(tensor: InputTensor, raw: bytes | None) -> NDArray[np.int64]:
    """An INT64 tensor in its shape. Raises ValueError."""
    _check(tensor, "INT64")
    if raw is not None:
        if len(raw) % _INT64.itemsize:
            raise ValueError(f"{tensor.name} has {len(raw)} bytes; an INT64 has 8")
        found = np.frombuffer(raw, _INT64)
    else:
        values = list(_flat(tensor.data or []))
        if not all(type(value) is int and -(2**63) <= value < 2**63 for value in values):
            raise ValueError(f"{tensor.name} must hold integers of 64 bits")
        found = np.array(values, np.int64)
    _check_count(tensor, len(found))
    return found.reshape(tensor.shape)


def floats(values: Sequence[float]) -> bytes:
    """FP32 as the binary extension has it."""
    return np.array(values, _FP32).tobytes()


def _check(tensor: InputTensor, datatype: str) -> None:
    if tensor.datatype != datatype:
        raise ValueError(f"{tensor.name} must have the datatype {datatype}")


def _check_count(tensor: InputTensor, count: int) -> None:
    if count != math.prod(tensor.shape):
        raise ValueError(f"{tensor.name} has {count} elements; its shape is {tensor.shape}")


def _flat(data: list[Any]) -> Iterator[Any]:
    """The elements of rows, or of a flat list."""
    for value in data:
        if isinstance(value, list):
            yield from value
        else:
            yield value


def _texts(name: str, raw: bytes) -> list[str]:
    found = []
    at = 0
    while at < len(raw):
        start = at + _UINT32.itemsize
        if start > len(raw):
            raise ValueError(f"{name} ends within the length of a string")
        at = start + int.from_bytes(raw[at:start], "little")
        if at > len(raw):
            raise ValueError(f"{name} ends within a string")
        try:
            found.append(raw[start:at].decode("utf-8"))
        except UnicodeDecodeError:
            raise ValueError(f"{name} holds a string that is not UTF-8") from None
    return found
