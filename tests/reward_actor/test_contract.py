"""The scoring contract: what is saved is what is read, and every difference is noticed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward_actor.contract import (
    ContractError,
    Golden,
    GoldenSample,
    HeldOut,
    ScoringContract,
    check_scores,
    model_version,
)


def floats(**limits: Any) -> st.SearchStrategy[float]:
    """Without -0.0, which equals 0.0 and is another text."""
    return st.floats(**limits).map(lambda value: value + 0.0)


finite = floats(allow_nan=False, allow_infinity=False, width=32)
contracts = st.builds(
    ScoringContract,
    format=st.just("text"),
    chat_template=st.none(),
    turn_end=st.text(max_size=5),
    add_special_tokens=st.booleans(),
    append_eos=st.booleans(),
    bos_token_id=st.none() | st.integers(0, 9),
    eos_token_id=st.none() | st.integers(0, 9),
    pad_token_id=st.integers(0, 9),
    max_length=st.integers(1, 10_000),
    vocab_size=st.integers(10, 100_000),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    mean=finite,
    std=st.floats(min_value=1e-3, max_value=1e3),
    golden=st.builds(
        Golden,
        samples=st.lists(
            st.builds(GoldenSample, st.text(), st.text(), st.lists(st.integers(0, 9))), max_size=3
        ),
        raw_scores=st.dictionaries(st.sampled_from(["float32"]), st.lists(finite, max_size=3)),
        tolerance=st.just({"float32": 1e-5}),
    ),
    held_out=st.none()
    | st.builds(
        HeldOut,
        quantiles=st.builds(
            lambda first, step: [first + step * n for n in range(101)],
            floats(min_value=-1e3, max_value=1e3),
            floats(min_value=0, max_value=10),
        ),
        length_correlation=st.none() | floats(min_value=-1, max_value=1),
        num_scores=st.integers(1, 10_000),
    ),
)
EXAMPLE = ScoringContract(
    format="chat",
    chat_template="{{ messages }}",
    turn_end="<|im_end|>",
    add_special_tokens=False,
    append_eos=False,
    bos_token_id=None,
    eos_token_id=2,
    pad_token_id=0,
    max_length=16,
    vocab_size=10,
    golden=Golden(raw_scores={"float32": [1.5, -200.0]}, tolerance={"float32": 1e-5}),
)


@given(contracts)
def test_a_contract_survives_json(contract: ScoringContract) -> None:
    assert ScoringContract.from_json(json.loads(json.dumps(contract.to_json()))) == contract


def test_a_contract_survives_a_directory(tmp_path: Path) -> None:
    EXAMPLE.save(tmp_path)
    assert ScoringContract.load(tmp_path) == EXAMPLE
    assert ScoringContract.load(tmp_path / "nowhere") is None


@given(contracts, contracts)
def test_versions_are_equal_exactly_when_contracts_are(
    a: ScoringContract, b: ScoringContract
) -> None:
    files = {"model.safetensors": "00"}
    versions = [model_version(files, contract, "float32") for contract in (a, b)]
    same = replace(a, dtype="float32") == replace(b, dtype="float32")
    assert (versions[0] == versions[1]) == same


def test_the_version_names_weights_and_dtype() -> None:
    versions = {
        model_version({"model.safetensors": digest}, EXAMPLE, dtype)
        for digest in ("00", "01")
        for dtype in ("float32", "bfloat16")
    }
    assert len(versions) == 4


def test_a_contract_without_held_out_scores_says_nothing_of_them() -> None:
    """So an export from before they were measured keeps its model_version."""
    assert "held_out" not in EXAMPLE.to_json()


def test_template_args_are_kept_and_count_in_the_version(tmp_path: Path) -> None:
    """Without any, an export from before the field existed keeps its model_version."""
    assert "template_args" not in EXAMPLE.to_json()
    told = replace(EXAMPLE, template_args={"enable_thinking": False, "tags": {"a": [None, 1.5]}})
    told.save(tmp_path)
    assert ScoringContract.load(tmp_path) == told
    files = {"model.safetensors": "00"}
    assert model_version(files, told, "float32") != model_version(files, EXAMPLE, "float32")


QUANTILES = [float(n) for n in range(101)]


@pytest.mark.parametrize(
    ("held_out", "message"),
    [
        ((QUANTILES[1:], None, 9), "100 numbers"),
        ((QUANTILES[::-1], None, 9), "ascending"),
        (([*QUANTILES[1:], float("inf")], None, 9), "finite"),
        (([*QUANTILES[1:], float("nan")], None, 9), "finite"),
        ((QUANTILES, 1.5, 9), "length_correlation is 1.5"),
        ((QUANTILES, float("nan"), 9), "length_correlation is nan"),
        ((QUANTILES, None, 0), "num_scores is 0"),
    ],
)
def test_a_distribution_that_is_none_is_refused(
    held_out: tuple[list[float], float | None, int], message: str
) -> None:
    quantiles, correlation, num_scores = held_out
    given = {
        "quantiles": quantiles,
        "length_correlation": correlation,
        "num_scores": num_scores,
    }
    with pytest.raises(ContractError, match=message):
        ScoringContract.from_json(EXAMPLE.to_json() | {"held_out": given})


@pytest.mark.parametrize("held_out", [{"quantiles": QUANTILES}, QUANTILES, "none"])
def test_an_incomplete_distribution_is_refused(held_out: object) -> None:
    with pytest.raises(ContractError, match="not complete"):
        ScoringContract.from_json(EXAMPLE.to_json() | {"held_out": held_out})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "xml"}, "format is 'xml'"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"std": 0.0}, "std is 0.0"),
        ({"max_length": 0}, "max_length is 0"),
        ({"pooling": "mean"}, "pooling is 'mean'"),
        ({"contract_version": 2}, "contract_version is 2"),
        ({"chat_template": None}, "no chat_template"),
        ({"template_args": [1]}, "template_args must be a JSON object"),
        ({"template_args": {"x": float("nan")}}, "template_args must be a JSON object"),
        ({"template_args": {"x": {1: 2}}}, "template_args must be a JSON object"),
        ({"template_args": {"x": object()}}, "template_args must be a JSON object"),
        ({"template_args": {"tools": []}}, "must not be named 'tools'"),
        ({"template_args": {"x": 1}, "format": "text"}, "template_args are for a chat template"),
    ],
)
def test_a_contract_that_cannot_be_kept_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ContractError, match=message):
        replace(EXAMPLE, **change)


def test_an_edited_template_is_noticed() -> None:
    data = EXAMPLE.to_json() | {"chat_template": "{{ other }}"}
    with pytest.raises(ContractError, match="edited by hand"):
        ScoringContract.from_json(data)


def test_unknown_and_missing_keys_are_named() -> None:
    with pytest.raises(ContractError, match="'colour'"):
        ScoringContract.from_json(EXAMPLE.to_json() | {"colour": 1})
    data = EXAMPLE.to_json()
    del data["max_length"]
    with pytest.raises(ContractError, match="max_length"):
        ScoringContract.from_json(data)


@pytest.mark.parametrize("scores", [[1.5, -200.0], [1.500009, -200.0019]])
def test_scores_within_the_tolerance_pass(scores: list[float]) -> None:
    check_scores(EXAMPLE, "float32", scores, "a test")


@pytest.mark.parametrize(
    "scores", [[1.50003, -200.0], [1.5, -200.003], [float("nan"), -200.0], [1.5, float("inf")]]
)
def test_other_scores_are_refused_with_both_numbers(scores: list[float]) -> None:
    with pytest.raises(ContractError, match=r"scores .* expects"):
        check_scores(EXAMPLE, "float32", scores, "a test")


def test_a_dtype_without_golden_scores_is_refused() -> None:
    with pytest.raises(ContractError, match="no golden rewards for dtype float16"):
        check_scores(EXAMPLE, "float16", [1.5, -200.0], "a test")
