"""The service over real HTTP and real Ray handles: right rewards, clear errors, dead replicas."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import titled

from reward_actor import AsyncRewardClient, Group, RewardClient, RewardHandle, RewardScorer
from reward_actor.client.handle import AsyncRewardHandle
from reward_actor.errors import RewardServiceError
from reward_actor.explain import explain

GROUPS = [
    Group("Name two fruits.", ["An apple and a pear.", "A hammer.", ""]),
    Group([{"role": "user", "content": "Hi."}], ["Hello, how can I help?"]),
    Group(prompt_ids=[5, 6, 7], completion_ids=[[8], [9, 10]]),
]


@pytest.fixture(scope="module")
def offline(export_dir: Path) -> RewardScorer:
    return RewardScorer.from_pretrained(export_dir, "cpu")


@pytest.fixture(scope="module")
def http(service: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=service, timeout=60) as client:
        yield client


def assert_equal_scores(served: Any, expected: Any) -> None:
    for ours, theirs in zip(served, expected, strict=True):
        assert ours.rewards == pytest.approx(theirs.rewards, abs=1e-5)
        assert ours.raw_scores == pytest.approx(theirs.raw_scores, abs=1e-5)
        assert ours.num_tokens == theirs.num_tokens
        assert ours.errors == theirs.errors
        assert ours.model_version == theirs.model_version


def test_every_route_gives_the_offline_rewards(service: str, offline: RewardScorer) -> None:
    expected = offline.score(GROUPS)
    with RewardClient(service) as client:
        assert_equal_scores(client.score_groups(GROUPS), expected)
        assert_equal_scores([client.score("Name two fruits.", GROUPS[0].completions)], expected[:1])
    handle = RewardHandle()
    assert_equal_scores(handle.score_groups(GROUPS), expected)

    async def awaited() -> tuple[Any, Any]:
        async with AsyncRewardClient(service) as client:
            over_http = await client.score_groups(GROUPS)
        return over_http, await AsyncRewardHandle().score_groups(GROUPS)

    for scores in asyncio.run(awaited()):
        assert_equal_scores(scores, expected)


def test_token_rewards_over_http(service: str, offline: RewardScorer) -> None:
    expected = offline.score(GROUPS, token_rewards=True)
    with RewardClient(service) as client:
        served = client.score_groups(GROUPS, token_rewards=True)
    for ours, theirs in zip(served, expected, strict=True):
        assert ours.token_rewards is not None
        assert theirs.token_rewards is not None
        for row, right in zip(ours.token_rewards, theirs.token_rewards, strict=True):
            assert row == pytest.approx(right, abs=1e-5)
    fruits, _, ids = served
    assert fruits.tokens is not None
    assert fruits.num_prompt_tokens is not None
    for tokens, n, completion in zip(
        fruits.tokens, fruits.num_prompt_tokens, GROUPS[0].completions, strict=True
    ):
        assert "".join(tokens[n:]) == completion + "<|im_end|>"
    assert ids.num_prompt_tokens == [3, 3]


def test_turn_rewards_by_every_way(service: str, http: httpx.Client, offline: RewardScorer) -> None:
    prompt = [
        {"role": "user", "content": "Hi."},
        {"role": "assistant", "content": "Hello <|im_end|>"},
        {"role": "user", "content": "Name two fruits."},
    ]
    groups = [Group(prompt, ["An apple and a pear.", "word " * 500]), Group("Hi.", ["Yes?"])]
    expected = offline.score(groups, turn_rewards=True)
    body = {"groups": [{"prompt": g.prompt, "completions": g.completions} for g in groups]}
    reply = http.post("/v1/score", json={**body, "turn_rewards": True})
    assert reply.status_code == 200, reply.text
    with RewardClient(service) as client:
        plain, both = (
            client.score_groups(groups, token_rewards=tokens, turn_rewards=True)
            for tokens in (False, True)
        )
    over_ray = RewardHandle().score_groups(groups, turn_rewards=True)
    in_json = [result["turn_rewards"] for result in reply.json()["results"]]
    for served in (
        in_json,
        *([s.turn_rewards for s in scores] for scores in (plain, both, over_ray)),
    ):
        for ours, theirs in zip(served, expected, strict=True):
            assert theirs.turn_rewards is not None
            for row, right in zip(ours, theirs.turn_rewards, strict=True):
                assert row == (None if right is None else pytest.approx(right, abs=1e-5))
    assert [len(row or []) for row in plain[0].turn_rewards or []] == [2, 0]
    for scores in (*plain, *both, *over_ray):
        for row, reward in zip(scores.turn_rewards or [], scores.rewards, strict=True):
            assert (row or [None])[-1] == reward
    assert plain[0].token_rewards is None
    assert both[0].token_rewards is not None
    for bad, why in (
        ({"prompt_ids": [5], "completion_ids": [[6]]}, "groups.1.prompt_ids: turn_rewards need"),
        ({"texts": ["Hi."]}, "groups.1.texts: turn_rewards need"),
    ):
        refused = {"groups": [body["groups"][1], bad], "turn_rewards": True}
        reply = http.post("/v1/score", json=refused)
        assert reply.status_code == 422
        assert reply.json()["error"]["index"] == 1
        assert why in reply.json()["error"]["message"]


def test_a_request_larger_than_a_batch_is_split_and_put_together(
    service: str, offline: RewardScorer
) -> None:
    groups = [Group(prompt_ids=[5] * 100, completion_ids=[[n] * 100, [n]]) for n in range(6, 130)]
    with RewardClient(service) as client:
        assert_equal_scores(client.score_groups(groups), offline.score(groups))


def test_what_is_served_can_be_asked(http: httpx.Client, offline: RewardScorer) -> None:
    assert http.get("/health").json()["status"] == "ok"
    ready = http.get("/ready").json()
    assert ready == {"status": "ok", "model_version": offline.model_version, "reason": None}
    [model] = http.get("/v1/models").json()["data"]
    assert model["model_version"] == offline.model_version
    info = http.get("/info").json()
    assert info["limits"]["max_length"] == offline.contract.max_length
    assert info["limits"]["body_limit_bytes"] == 1_000_000
    assert info["dtype"] == "float32"
    assert "Rayward" in http.get("/docs").text
    paths = http.get("/openapi.json").json()["paths"]
    assert {"/v1/score", "/v1/models", "/info", "/health", "/ready"} <= set(paths)


def test_a_reward_is_explained_as_the_command_does(
    http: httpx.Client, offline: RewardScorer
) -> None:
    asked = [
        {"prompt": "Name two fruits.", "completions": ["An apple and a pear."]},
        {"prompt_ids": [5, 6], "completion_ids": [[7]]},
        {"prompt": "Hi.", "completions": ["word " * 500]},
    ]
    for body in asked:
        reply = http.post("/v1/explain", json=body)
        assert reply.status_code == 200, reply.text
        told = reply.json()
        printed = list(explain(offline, Group(**body)))
        at = printed.index("completion 0") + 1
        assert [f"  {line}" for line in told["lines"]] == printed[at:]
        assert told["model_version"] == offline.model_version
        for line in told["model_lines"][3:]:
            assert line in printed
        assert any(line.startswith("    max_length = ") for line in told["model_lines"])
        marked = [line for line in told["lines"] if line.endswith("<- read here")]
        assert len(marked) == ("word" not in str(body))
    refused = http.post("/v1/explain", json={"prompt": "Hi.", "completions": ["a", "b"]})
    assert refused.status_code == 422
    assert "give one completion" in refused.json()["error"]["message"]


def test_a_bad_sample_is_an_error_of_its_own(http: httpx.Client) -> None:
    group = {"prompt": "Hi.", "completions": ["fine", "word " * 500, "\ud800"]}
    reply = http.post("/v1/score", content=json.dumps({"groups": [group]}), headers=JSON)
    assert reply.status_code == 200
    [result] = reply.json()["results"]
    assert [error and error["type"] for error in result["errors"]] == [
        None,
        "too_long",
        "unrenderable",
    ]
    assert [reward is None for reward in result["rewards"]] == [False, True, True]


JSON = {"Content-Type": "application/json"}
IDS = {"prompt_ids": [1], "completion_ids": [[2]]}


@pytest.mark.parametrize(
    ("body", "status", "type_", "message"),
    [
        ("{", 422, "invalid_request", "JSON"),
        ("[]", 422, "invalid_request", "object"),
        ({"groups": [{"prompt": "a"}]}, 422, "invalid_request", "not a mixture"),
        ({"groups": [{**IDS, "prompt": "a"}]}, 422, "invalid_request", "not a mixture"),
        ({"groups": [IDS, {**IDS, "colour": 1}]}, 422, "invalid_request", "'colour'"),
        ({"groups": [{**IDS, "prompt_ids": [-1]}]}, 422, "invalid_request", "greater than"),
        ({"groups": [{**IDS, "prompt_ids": [2**31]}]}, 422, "invalid_request", "less than"),
        ({"groups": [IDS], "model": "other"}, 404, "not_found", "no model of that name"),
        ({"groups": [{**IDS, "completion_ids": [[2]] * 501}]}, 413, "too_many_tokens", "501"),
        (
            {"groups": [{"prompt": "a" * 10**6, "completions": []}]},
            413,
            "body_too_large",
            "1000000",
        ),
        ('{"groups": [{"prompt": NaN, "completions": []}]}', 422, "invalid_request", "prompt"),
        ('{"groups": [], "\\ud800": 1}', 422, "invalid_request", "unicode"),
        ('{"groups":' + "[" * 10_000 + "]" * 10_000 + "}", 422, "invalid_request", ""),
    ],
)
def test_a_bad_request_is_told_what_is_wrong(
    http: httpx.Client, body: Any, status: int, type_: str, message: str
) -> None:
    content = body if isinstance(body, str) else json.dumps(body)
    reply = http.post("/v1/score", content=content, headers=JSON)
    assert reply.status_code == status
    error = reply.json()["error"]
    assert error["type"] == type_
    assert message in error["message"]
    assert error["retryable"] is False


def test_an_error_names_the_group_and_never_echoes_the_input(http: httpx.Client) -> None:
    canary = "canary in a coal mine"
    for group in ({"prompt": 7, "completions": [canary]}, {**IDS, canary: 1}, {**IDS, "model": 1}):
        reply = http.post("/v1/score", json={"groups": [IDS, group]})
        assert reply.json()["error"]["index"] == 1
        assert "canary" not in reply.text


def test_a_body_without_a_length_is_limited_too(http: httpx.Client) -> None:
    chunks = (b" " * 100_000 for _ in range(30))
    reply = http.post("/v1/score", content=chunks, headers=JSON)
    assert reply.status_code == 413
    assert reply.json()["error"]["type"] == "body_too_large"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
bodies = st.one_of(
    st.binary(max_size=200),
    json_values.map(lambda value: json.dumps(value).encode()),
    st.fixed_dictionaries(
        {"groups": st.lists(st.dictionaries(st.sampled_from([*IDS, "prompt"]), json_values))}
    ).map(lambda value: json.dumps(value).encode()),
)


@settings(max_examples=100)
@given(bodies)
def test_no_body_breaks_the_service(http: httpx.Client, body: bytes) -> None:
    assert http.post("/v1/score", content=body, headers=JSON).status_code in (200, 413, 422)


def test_unknown_paths_and_methods_are_json_errors(http: httpx.Client) -> None:
    assert http.get("/nope").json()["error"]["type"] == "not_found"
    refused = http.get("/v1/score")
    assert refused.status_code == 405
    assert refused.json()["error"]["type"] == "invalid_request"


def test_a_killed_replica_costs_no_request(service: str, offline: RewardScorer) -> None:
    """Four clients without retries of their own, while both replicas are killed one by one."""
    groups = [Group(prompt_ids=[5], completion_ids=[[n]]) for n in range(6, 26)]
    expected = [result.rewards[0] for result in offline.score(groups)]
    failures: list[str] = []
    num_right = 0
    stop = threading.Event()

    def hammer() -> None:
        body = {"groups": [{"prompt_ids": [5], "completion_ids": [[n]]} for n in range(6, 26)]}
        nonlocal num_right
        with httpx.Client(base_url=service, timeout=60) as client:
            while not stop.is_set():
                try:
                    reply = client.post("/v1/score", json=body)
                except httpx.HTTPError as error:
                    failures.append(repr(error))
                    return
                if reply.status_code != 200:
                    failures.append(f"{reply.status_code} {reply.text[:200]}")
                    continue
                got = [result["rewards"][0] for result in reply.json()["results"]]
                if got != pytest.approx(expected, abs=1e-5):
                    failures.append(f"wrong rewards {got}")
                num_right += 1

    def wait_for_more(num: int) -> None:
        enough, deadline = num_right + num, time.monotonic() + 60
        while num_right < enough:
            assert time.monotonic() < deadline, failures
            time.sleep(0.01)

    clients = [threading.Thread(target=hammer) for _ in range(4)]
    for client in clients:
        client.start()
    try:
        pids = replica_pids()
        assert len(pids) == 2
        for pid in pids:
            wait_for_more(20)
            os.kill(pid, signal.SIGKILL)
        wait_for_more(20)
    finally:
        stop.set()
        for client in clients:
            client.join()
    assert failures == []


def test_a_redeployment_fails_no_request(
    service: str, serve_config: Any, offline: RewardScorer
) -> None:
    """Four clients ask as long as it takes to replace every replica and ingress."""
    from ray import serve

    from serve.app import APP_NAME, build, resolve

    [expected] = offline.score([Group(prompt_ids=[5], completion_ids=[[n] for n in range(6, 56)])])
    indices = itertools.count()
    failures: list[str] = []
    is_done = threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=service, timeout=60) as client:
            for index in indices:
                n = index % 50
                body = {"groups": [{"prompt_ids": [5], "completion_ids": [[n + 6]]}]}
                try:
                    reply = client.post("/v1/score", json=body)
                    [reward] = reply.json()["results"][0]["rewards"]
                except (httpx.HTTPError, KeyError, ValueError) as error:
                    failures.append(repr(error))
                    continue
                if reward != pytest.approx(expected.rewards[n], abs=1e-5):
                    failures.append(f"{reward} instead of {expected.rewards[n]}")
                if is_done.wait(0.02):
                    return

    before = set(replica_pids())
    clients = [threading.Thread(target=ask) for _ in range(4)]
    for client in clients:
        client.start()
    application = build(resolve(serve_config), use_gpu=False)
    try:
        serve.run(application, name=APP_NAME, route_prefix="/")
    finally:
        is_done.set()
        for client in clients:
            client.join()
    assert failures == []
    assert next(indices) >= 100
    assert len(set(replica_pids()) - before) == 2


def replica_pids() -> list[int]:
    """Those of these tests' own cluster; another service may run on the machine."""
    return [process.pid for process in titled("ray::ServeReplica:rayward:RewardModel")]


def test_the_http_port_is_bound_to_loopback_only(service: str) -> None:
    port = int(service.rsplit(":", 1)[1])
    listening = [c for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    assert {c.laddr.ip for c in listening if c.laddr.port == port} == {"127.0.0.1"}


def test_ray_asks_for_a_token(ray_cluster: None) -> None:
    import grpc
    import ray

    method = "/ray.rpc.NodeInfoGcsService/GetClusterId"
    channel = grpc.insecure_channel(ray.get_runtime_context().gcs_address)
    with channel, pytest.raises(grpc.RpcError) as refused:
        channel.unary_unary(method)(b"", timeout=30)
    assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED


def test_the_client_raises_typed_errors_and_gives_up_in_time(service: str) -> None:
    with RewardClient(service) as client, pytest.raises(RewardServiceError) as refused:
        client.score_groups([Group(prompt_ids=[1], completion_ids=[[2]] * 501)])
    assert refused.value.type == "too_many_tokens"
    assert refused.value.retryable is False
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        started = time.monotonic()
        with RewardClient(url, timeout_s=1.0) as client, pytest.raises(RewardServiceError) as gone:
            client.score("Hi.", ["Yes?"])
        assert gone.value.type == "unavailable"
        assert time.monotonic() - started < 5.0
    with pytest.raises(ValueError, match="http://"):
        RewardClient("localhost:8000")


def test_errors_keep_their_type_over_a_handle(service: str) -> None:
    with pytest.raises(RewardServiceError) as refused:
        RewardHandle().score_groups([Group(prompt_ids=[1], completion_ids=[[2]] * 501)])
    assert refused.value.type == "too_many_tokens"
    with pytest.raises(ValueError, match="no Serve application 'nope'"):
        RewardHandle("nope")
