"""What a service answers other systems where it has no reward, raw scores in place of rewards, and
rewards of the operator's own functions."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward_actor import Group, RewardClient, RewardScorer
from reward_actor.config_errors import validate
from serve.config import ServeConfig
from serve.protocols.drop_in import ERROR_REWARDS_HEADER, sigmoid

TOO_LONG = "word " * 400


def close(values: Any) -> Any:
    return pytest.approx(values, abs=1e-5)


@given(st.floats(-1e300, 1e300))
def test_the_sigmoid_takes_any_number(value: float) -> None:
    assert 0.0 <= sigmoid(value) <= 1.0
    assert sigmoid(value) + sigmoid(-value) == pytest.approx(1.0)


def application(service: str, name: str, config: ServeConfig) -> Iterator[str]:
    """The URL of a second application of the shared service's cluster."""
    from ray import serve

    from serve.app import build, resolve

    config = config.model_copy(
        update={"device": "cpu", "cpus_per_replica": 0.5, "threads_per_replica": 1}
    )
    serve.run(build(resolve(config), use_gpu=False), name=name, route_prefix=f"/{name}")
    yield f"{service}/{name}"
    serve.delete(name)


ERROR_REWARD = -10.0

FUNCTIONS = """
def brevity(prompt, completions):
    return [None if completion == "None." else -len(completion) for completion in completions]

def jackpot(prompt, completions):
    return [float(completion == "Jackpot!") for completion in completions]

REWARDS = {"brevity": brevity, "jackpot": jackpot}
WEIGHTS = {"jackpot": 1e6}
"""


@pytest.fixture(scope="module")
def lenient(
    service: str, export_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[httpx.Client]:
    """A service that answers a number for what cannot be scored, and has functions of its own."""
    functions = tmp_path_factory.mktemp("functions") / "rewards.py"
    functions.write_text(FUNCTIONS)
    config = ServeConfig(model=str(export_dir), error_reward=ERROR_REWARD, functions=str(functions))
    for url in application(service, "lenient", config):
        with httpx.Client(base_url=url, timeout=60) as client:
            yield client


GOOD = "An apple and a pear."


def bad_among_good() -> dict[str, tuple[str, Any, Callable[[Any], list[float]]]]:
    """Of each protocol: its path, a body whose second sample of three is too long, and where a
    reply has its numbers."""
    texts = [GOOD, TOO_LONG, GOOD]
    sentences = {"name": "sentences", "datatype": "BYTES", "shape": [3], "data": texts}
    infer = "/v2/models/reward_model/infer"
    # fmt: off
    return {
        "OpenRLHF": ("/get_reward", {"query": texts}, lambda r: r["rewards"]),
        "vLLM classify": (
            "/classify", {"input": texts}, lambda r: [one["probs"][0] for one in r["data"]]
        ),
        "vLLM pooling": (
            "/pooling", {"input": texts}, lambda r: [one["data"][0] for one in r["data"]]
        ),
        "vLLM tokens": (
            "/pooling", {"input": texts, "task": "token_classify"},
            lambda r: [one["data"][-1][0] for one in r["data"]],
        ),
        "OpenAI": (
            "/v1/embeddings", {"input": texts}, lambda r: [one["embedding"][0] for one in r["data"]]
        ),
        "SGLang classify": (
            "/classify", {"text": texts}, lambda r: [one["embedding"][0] for one in r]
        ),
        "SGLang score": (
            "/v1/score", {"query": "a ", "items": texts}, lambda r: [s for [s] in r["scores"]]
        ),
        "TEI": (
            "/predict", {"inputs": [[text] for text in texts], "raw_scores": True},
            lambda r: [one["score"] for [one] in r],
        ),
        "LLaMA-Factory": ("/v1/score/evaluation", {"messages": texts}, lambda r: r["scores"]),
        "KServe": (infer, {"inputs": [sentences]}, lambda r: r["outputs"][0]["data"]),
    }
    # fmt: on


@pytest.mark.parametrize("protocol", bad_among_good())
def test_a_sample_that_cannot_be_scored_gets_the_error_reward(
    http: httpx.Client, lenient: httpx.Client, protocol: str
) -> None:
    path, body, numbers = bad_among_good()[protocol]
    refused = http.post(path, json=body)
    assert refused.status_code == 422
    assert "too_long" in refused.text
    reply = lenient.post(path, json=body)
    assert reply.status_code == 200, reply.text
    first, substitute, last = numbers(reply.json())
    assert substitute == ERROR_REWARD
    assert first == last != ERROR_REWARD
    assert reply.headers[ERROR_REWARDS_HEADER] == "1"
    short = json.loads(json.dumps(body).replace(TOO_LONG, GOOD))
    whole = http.post(path, json=short)
    assert numbers(whole.json()) == close([first] * 3), "the others' rewards are what they were"


def test_one_sample_alone_gets_the_error_reward(lenient: httpx.Client) -> None:
    alone = {"prompt": "Hi.", "response": TOO_LONG}
    assert lenient.post("/reward/slime", json=alone).json() == ERROR_REWARD
    said = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": TOO_LONG}]
    classified = lenient.post("/classify", json={"messages": said}).json()
    assert classified["data"][0]["probs"] == [ERROR_REWARD]
    for error in ([6, 9999], []):  # of the vocabulary, and nothing at all
        reply = lenient.post("/classify", json={"input": [[5], error]})
        assert reply.json()["data"][1]["probs"] == [ERROR_REWARD]
    activated = lenient.post("/predict", json={"inputs": TOO_LONG}).json()
    assert activated[0]["score"] == pytest.approx(sigmoid(ERROR_REWARD)), "as any reward is"


def test_rewards_of_functions_go_by_their_names(lenient: httpx.Client, http: httpx.Client) -> None:
    texts = [GOOD, TOO_LONG]
    logs = lenient.post("/get_reward", json={"query": texts}).json()["extra_logs"]
    assert logs["reward/brevity"] == [-len(GOOD), ERROR_REWARD]
    body = {"groups": [{"prompt": "Hi.", "completions": ["Hello.", "None.", TOO_LONG]}]}
    [plain], [named] = (
        client.post("/v1/score", json=body).json()["results"] for client in (http, lenient)
    )
    assert plain["named_rewards"] is None
    assert named["named_rewards"] == {
        "model": named["rewards"],
        "brevity": [-6, None, None],
        "jackpot": [0, 0, None],
    }
    assert named["rewards"] == close(plain["rewards"])
    group = Group(prompt_ids=[5, 6], completion_ids=[[7], [8, 9]])
    with RewardClient(str(lenient.base_url)) as client:  # in binary bodies
        [by_ids] = client.score_groups([group])
    assert by_ids.spread is None
    names = by_ids.named_rewards or {}
    assert names["model"] == by_ids.rewards
    assert all(reward is not None and reward < 0 for reward in names["brevity"])
    assert lenient.get("/info").json()["functions"] == {"brevity": 0.0, "jackpot": 1e6}


def test_a_functions_rewards_are_no_drift_of_the_models(lenient: httpx.Client) -> None:
    body = {"groups": [{"prompt": "Hi.", "completions": ["Jackpot!"]}]}
    [result] = lenient.post("/v1/score", json=body).json()["results"]
    assert result["rewards"] == close([result["named_rewards"]["model"][0] + 1e6])
    [watched] = lenient.get("/v1/monitor").json()["models"]
    assert abs(watched["mean"]) < 100


def test_an_explanation_has_the_functions_as_well(lenient: httpx.Client) -> None:
    group = {"prompt": "Hi.", "completions": ["Jackpot!"]}
    [result] = lenient.post("/v1/score", json={"groups": [group]}).json()["results"]
    lines = lenient.post("/v1/explain", json=group).json()["lines"]
    assert lines[-4].startswith(f"reward {result['named_rewards']['model'][0]:.7g} = ")
    assert lines[-3:] == [
        "function brevity -8, weight 0",
        "function jackpot 1, weight 1e+06",
        f"reward with functions {result['rewards'][0]:.7g}",
    ]


def test_nothing_but_a_samples_error_gets_the_error_reward(lenient: httpx.Client) -> None:
    for path, body, status in (
        ("/get_reward", {"query": ["fine", 7]}, 422),
        ("/classify", {"input": ["fine"], "model": "another"}, 404),
        ("/v1/score", {"query": "a", "items": ["b"] * 10_001}, 413),
    ):
        assert lenient.post(path, json=body).status_code == status


def test_the_native_route_has_no_error_reward(lenient: httpx.Client) -> None:
    group = {"prompt": "Hi.", "completions": ["Hello.", TOO_LONG]}
    reply = lenient.post("/v1/score", json={"groups": [group]})
    [result] = reply.json()["results"]
    assert result["rewards"][1] is None
    assert result["errors"][1]["type"] == "too_long"
    assert ERROR_REWARDS_HEADER not in reply.headers
    with RewardClient(str(lenient.base_url)) as client:
        scores = client.score("Hi.", ["Hello.", TOO_LONG])
        assert scores.rewards == [close(result["rewards"][0]), None]
        assert client.info().error_reward == ERROR_REWARD


@pytest.mark.parametrize("value", ["nan", "inf", "none", None, [1.0]])
def test_an_error_reward_is_a_finite_number(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^error_reward is .*: it must be a finite number, or re"):
        validate(ServeConfig, {"model": "m", "error_reward": value})
    assert validate(ServeConfig, {"model": "m", "error_reward": "-10"}).error_reward == -10.0


@pytest.fixture(scope="module")
def raw_url(service: str, seeds: list[Path]) -> Iterator[str]:
    """A service that answers other systems with raw scores of a model that is normalised."""
    config = ServeConfig(model=str(seeds[1]), drop_in_scores="raw_score")
    yield from application(service, "raw", config)


def test_raw_scores_can_be_had_for_all_of_them(raw_url: str, seeds: list[Path]) -> None:
    scorer = RewardScorer.from_pretrained(seeds[1], "cpu")
    [expected] = scorer.score([Group(prompt_ids=[5], completion_ids=[[6, 7]])])
    assert expected.rewards != close(expected.raw_scores)
    bodies: list[tuple[str, dict[str, Any]]] = [
        ("/classify", {"input": [5, 6, 7]}),
        ("/v1/score", {"query": [5], "items": [[6, 7]]}),
        ("/pooling", {"input": [5, 6, 7], "task": "token_classify"}),
        ("/v1/score", {"groups": [{"prompt_ids": [5], "completion_ids": [[6, 7]]}]}),
    ]
    with httpx.Client(timeout=60) as client:
        replies = [client.post(raw_url + path, json=body).json() for path, body in bodies]
    classified, scored, refused, native = replies
    assert classified["data"][0]["probs"] == close(expected.raw_scores)
    assert scored["scores"][0] == close(expected.raw_scores)
    assert "token_rewards" in refused["error"]["message"]
    assert native["results"][0]["rewards"] == close(expected.rewards)
