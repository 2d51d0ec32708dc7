"""Bodies of KServe's v2 protocol, as its clients send them."""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np

INFER = "/v2/models/reward_model/infer"
LENGTH = "Inference-Header-Content-Length"


def packed(strings: list[str]) -> bytes:
    encoded = [string.encode() for string in strings]
    return b"".join(struct.pack("<I", len(each)) + each for each in encoded)


def tokens(rows: list[list[int]], width: int, pad: int = 0) -> tuple[Any, Any]:
    """Padded rows and their lengths, as NeMo-Aligner sends them."""
    padded = [row + [pad] * (width - len(row)) for row in rows]
    return np.array(padded, "<i8"), np.array([[len(row)] for row in rows], "<i8")


def in_json(name: str, values: Any, datatype: str = "INT64") -> dict[str, Any]:
    shape = list(np.shape(values))
    return {"name": name, "datatype": datatype, "shape": shape, "data": np.array(values).tolist()}


def binary(
    tensors: list[tuple[str, str, list[int], bytes]], **head: Any
) -> tuple[bytes, dict[str, str]]:
    """A body in the binary extension with its headers."""
    inputs = [
        {
            "name": name,
            "datatype": datatype,
            "shape": shape,
            "parameters": {"binary_data_size": len(raw)},
        }
        for name, datatype, shape, raw in tensors
    ]
    text = json.dumps({"inputs": inputs, **head}).encode()
    headers = {LENGTH: str(len(text)), "Content-Type": "application/octet-stream"}
    return text + b"".join(raw for *_, raw in tensors), headers


LENGTHS = in_json("sequence_lengths", [[1]])
