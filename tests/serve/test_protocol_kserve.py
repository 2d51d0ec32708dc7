"""KServe's v2 protocol: its tensors come back, and a refusal repeats nothing of a body."""

from __future__ import annotations

import contextlib
import struct
from typing import Any

import numpy as np
import pytest
from applications import application, ask
from hypothesis import given
from hypothesis import strategies as st
from kserve_bodies import INFER, LENGTHS, packed
from pydantic import ValidationError

from serve.protocols.kserve import InferRequest, to_whole
from serve.protocols.kserve_tensors import InputTensor, floats, integers, split, texts


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), max_size=5))
def test_bytes_come_back(strings: list[str]) -> None:
    tensor = InputTensor(name="sentences", datatype="BYTES", shape=[len(strings)])
    assert texts(tensor, packed(strings)) == strings


@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=12))
def test_integers_come_back(values: list[int]) -> None:
    tensor = InputTensor(name="tokens", datatype="INT64", shape=[len(values)])
    assert integers(tensor, np.array(values, "<i8").tobytes()).tolist() == values


@given(st.binary(max_size=60), st.sampled_from(["BYTES", "INT64"]), st.integers(0, 4))
def test_garbage_is_a_value_error(raw: bytes, datatype: str, rows: int) -> None:
    tensor = InputTensor(name="x", datatype=datatype, shape=[rows])
    read: Any = texts if datatype == "BYTES" else integers
    with contextlib.suppress(ValueError):
        assert len(read(tensor, raw)) == rows


@given(st.binary(max_size=80), st.integers(0, 100).map(str) | st.text(max_size=4))
def test_a_garbled_body_is_a_value_error(body: bytes, length: str) -> None:
    with contextlib.suppress(ValueError):
        head, raw = split(body, length)
        assert head + raw == body
        to_whole(InferRequest.model_validate_json(head), raw)


def test_floats_are_little_endian() -> None:
    assert floats([1.5, -2.0]) == struct.pack("<2f", 1.5, -2.0)


CANARY = "CANARY my secret prompt"
NAMED = {"name": CANARY, "datatype": "INT64", "shape": [1, 1], "data": [[1]]}


@pytest.mark.parametrize(
    "change",
    [
        {"data": None},
        {"parameters": {"binary_data_size": 4}},
        {"data": None, "parameters": {"binary_data_size": 4}},
        {},
        {"datatype": CANARY},
        {"shape": [CANARY]},
        {"name": "tokens", "datatype": CANARY},
        {"name": "tokens", "data": [[CANARY]]},
        {"name": "sentences", "datatype": "BYTES", "data": [CANARY, CANARY]},
        {"parameters": {CANARY: CANARY, "binary_data_size": CANARY}},
        {CANARY: CANARY, "data": CANARY},
    ],
)
def test_what_a_client_writes_is_not_repeated(change: dict[str, Any]) -> None:
    tensor = NAMED | change
    for inputs in ([LENGTHS, tensor], [tensor, tensor]):
        body = {"id": CANARY, "inputs": inputs, "outputs": [{"name": CANARY}]}
        for sent in (body, {**body, "outputs": None}, {"inputs": inputs, "outputs": CANARY}):
            reply = ask(application(), "POST", INFER, json=sent)
            assert reply.status_code == 422
            assert "CANARY" not in reply.text
    assert "CANARY" not in ask(application(), "GET", f"/v2/models/{CANARY}").text


def test_an_input_without_its_elements_is_named_by_its_place() -> None:
    reply = ask(application(), "POST", INFER, json={"inputs": [LENGTHS, NAMED | {"data": None}]})
    assert "input 1 must have data" in reply.json()["error"]


def test_an_id_that_cannot_be_sent_back_is_refused() -> None:
    """A lone surrogate: legal in JSON, but only as an escape."""
    with pytest.raises(ValidationError, match="not valid Unicode"):
        InferRequest.model_validate({"id": "\ud800", "inputs": []})
