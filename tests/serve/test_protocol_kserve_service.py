"""KServe's v2 protocol on the service, in JSON and in the binary tensor extension."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from kserve_bodies import INFER, LENGTH, LENGTHS, binary, in_json, packed, tokens
from offline import reward, templated

if TYPE_CHECKING:
    import httpx

    from reward_actor import RewardScorer

ROWS = [[5, 6, 7], [5], [9, 10]]


def close(values: Any) -> Any:
    return pytest.approx(values, abs=1e-5)


def test_sentences_in_json_and_in_binary(http: httpx.Client, offline: RewardScorer) -> None:
    completions = ["Hello.", "What?"]
    sentences = [templated(offline, "Hi.", completion) for completion in completions]
    expected = [reward(offline, "Hi.", completion) for completion in completions]
    for shape in ([2], [2, 1]):
        data: Any = sentences if len(shape) == 1 else [[sentence] for sentence in sentences]
        inputs = [{"name": "sentences", "datatype": "BYTES", "shape": shape, "data": data}]
        reply = http.post(INFER, json={"id": "7", "inputs": inputs}).json()
        assert reply == {
            "model_name": "reward_model",
            "model_version": offline.model_version,
            "id": "7",
            "outputs": [
                {"name": "rewards", "datatype": "FP32", "shape": [2, 1], "data": close(expected)}
            ],
        }
        # As PyTriton's client does: bytes both ways, and a tensor that only NeMo-Aligner knows.
        body, headers = binary(
            [
                ("sentences", "BYTES", shape, packed(sentences)),
                ("add_EOS", "BOOL", [2, 1], b"\0\0"),
            ],
            outputs=[{"name": "rewards", "parameters": {"binary_data": True}}],
        )
        answer = http.post(INFER, content=body, headers=headers)
        assert answer.status_code == 200
        size = int(answer.headers[LENGTH])
        [output] = json.loads(answer.content[:size])["outputs"]
        assert output["parameters"] == {"binary_data_size": 8}
        assert output["shape"] == [2, 1]
        assert "data" not in output
        found = np.frombuffer(answer.content[size:], "<f4").tolist()
        assert found == close(expected)


@pytest.mark.parametrize("pad", [0, -1, 9999])
def test_tokens_are_scored_without_what_pads_them(
    http: httpx.Client, offline: RewardScorer, pad: int
) -> None:
    expected = offline.score_ids(ROWS).tolist()
    rows, lengths = tokens(ROWS, 8, pad)
    inputs = [in_json("tokens", rows), in_json("sequence_lengths", lengths)]
    for body in (
        {"inputs": inputs},
        {"inputs": [in_json("tokens", rows), in_json("sequence_lengths", lengths.ravel())]},
        {"inputs": [{**inputs[0], "data": rows.ravel().tolist()}, inputs[1]]},
    ):
        [output] = http.post(INFER, json=body).json()["outputs"]
        assert output["data"] == close(expected)
    content, headers = binary(
        [
            ("sequence_lengths", "INT64", [3, 1], lengths.tobytes()),
            ("tokens", "INT64", [3, 8], rows.tobytes()),
        ],
        parameters={"binary_data_output": True},
    )
    answer = http.post("/v2/models/reward-model/infer", content=content, headers=headers)
    found = np.frombuffer(answer.content[int(answer.headers[LENGTH]) :], "<f4")
    assert found.tolist() == close(expected)


def test_the_other_routes(http: httpx.Client, offline: RewardScorer) -> None:
    for path in ("/v2/health/live", "/v2/health/ready", "/v2/models/reward_model/ready"):
        assert http.get(path).status_code == 200
    metadata = http.get("/v2/models/reward_model").json()
    assert metadata["versions"] == [offline.model_version]
    assert [each["name"] for each in metadata["inputs"]] == [
        "sentences",
        "tokens",
        "sequence_lengths",
    ]
    config = http.get("/v2/models/reward_model/config").json()
    assert config["max_batch_size"] == 500
    assert config["output"] == [{"name": "rewards", "data_type": "TYPE_FP32", "dims": [1]}]
    for path in ("", "/ready", "/config"):
        refused = http.get("/v2/models/other" + path)
        assert refused.status_code == 404
        assert "'reward_model'" in refused.json()["error"]


TOKENS = in_json("tokens", [[5, 6]])


SENTENCES = {"name": "sentences", "datatype": "BYTES", "shape": [1], "data": ["Hi."]}


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([], "give sentences, or tokens"),
        ([SENTENCES, TOKENS, LENGTHS], "give sentences, or tokens"),
        ([TOKENS], "need sequence_lengths"),
        ([SENTENCES, SENTENCES], "the same name"),
        ([{**SENTENCES, "shape": [2]}], "1 elements"),
        ([{**SENTENCES, "shape": [1, 2], "data": ["a", "b"]}], "[B, 1]"),
        ([{**SENTENCES, "shape": [1, 1, 1]}], "shape"),
        ([{**SENTENCES, "datatype": "FP32"}], "the datatype BYTES"),
        ([{**SENTENCES, "data": [7]}], "hold strings"),
        ([{**SENTENCES, "data": None}], "binary_data_size"),
        ([{**SENTENCES, "data": None, "parameters": {"binary_data_size": 4}}], "behind the JSON"),
        ([{**TOKENS, "data": [[5.5, 6]]}, LENGTHS], "integers"),
        ([{**TOKENS, "data": [[True, 6]]}, LENGTHS], "integers"),
        ([{**TOKENS, "data": [[2**63, 6]]}, LENGTHS], "integers"),
        ([TOKENS, in_json("sequence_lengths", [[3]])], "between 0 and 2"),
        ([TOKENS, in_json("sequence_lengths", [[-1]])], "between 0 and 2"),
        ([TOKENS, in_json("sequence_lengths", [[1], [1]])], "1 rows of tokens and 2 lengths"),
        ([in_json("tokens", [5, 6]), LENGTHS], "[B, L]"),
        ([TOKENS, in_json("sequence_lengths", [[0]])], "empty_sequence"),
        ([in_json("tokens", [[9999, 6]]), LENGTHS], "token_out_of_vocabulary"),
        ([{**SENTENCES, "data": ["word " * 400]}], "too_long"),
    ],
)
def test_what_is_refused_is_said_in_a_string(http: httpx.Client, inputs: Any, message: str) -> None:
    reply = http.post(INFER, json={"inputs": inputs})
    assert reply.status_code == 422
    assert message in reply.json()["error"]
    assert reply.json()["retryable"] is False


def test_an_unknown_output_and_a_wrong_length_are_refused(http: httpx.Client) -> None:
    body = {"inputs": [SENTENCES], "outputs": [{"name": "values"}]}
    assert "only output" in http.post(INFER, json=body).json()["error"]
    content, headers = binary([("sentences", "BYTES", [1], packed(["Hi."]))])
    for length in ("-1", "x", "99999", "1" * 30, ""):
        refused = http.post(INFER, content=content, headers={**headers, LENGTH: length})
        assert refused.status_code == 422, length
    assert http.post(INFER, content=content[:-1], headers=headers).status_code == 422


def test_no_samples_are_no_rewards(http: httpx.Client) -> None:
    empty = {"name": "sentences", "datatype": "BYTES", "shape": [0, 1], "data": []}
    [output] = http.post(INFER, json={"inputs": [empty]}).json()["outputs"]
    assert (output["shape"], output["data"]) == ([0, 1], [])
