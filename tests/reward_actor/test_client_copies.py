"""Clients and reward functions that are pickled or copied, on their way to where trainers call."""

from __future__ import annotations

import asyncio
import copy
import importlib.util
import pickle
import ssl
from collections.abc import Callable
from typing import Any

import cloudpickle
import pytest
from stub_service import stub

from reward_actor import AsyncRewardClient, RewardClient
from reward_actor.integrations import openrlhf, scorers, verl
from reward_actor.integrations.nemo_rl import RewardEnvironment
from reward_actor.integrations.skyrl import RewardStep
from reward_actor.integrations.trl import reward_function

SECRET = "secret-token-0123456789"

COPIES: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "cloudpickle": lambda value: pickle.loads(cloudpickle.dumps(value)),
    "deepcopy": copy.deepcopy,
}
every_way = pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)


def sync_rewards(client: RewardClient) -> list[float | None]:
    return client.score("p", ["xyz"]).rewards


def async_rewards(client: AsyncRewardClient) -> list[float | None]:
    return asyncio.run(client.score("p", ["xyz"])).rewards


@every_way
@pytest.mark.parametrize(
    ("kind", "rewards"), [(RewardClient, sync_rewards), (AsyncRewardClient, async_rewards)]
)
def test_a_copy_of_a_client_has_its_settings_and_its_own_connections(
    kind: Any, rewards: Any, copied: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAYWARD_TOKEN", raising=False)
    with stub() as server:
        client = kind(server.url, token=SECRET, timeout_s=9.0, max_concurrency=3, verify=False)
        assert rewards(client) == [3.0]  # with connections, and a thread or a loop
        copies = [copied(client)]
        if kind is RewardClient:
            client.close()
        else:
            asyncio.run(client.close())
        copies += [copied(client), copied(copies[0])]
        for one in copies:
            assert type(one) is kind
            assert one.urls == [server.url]
            assert rewards(one) == [3.0]
            assert "secret" not in repr(one)
        assert {got.headers["authorization"] for got in server.received} == {f"Bearer {SECRET}"}
        assert len({got.connection for got in server.received}) == 4
        settings = copies[0].__reduce__()[0].keywords
        assert (settings["timeout_s"], settings["max_concurrency"]) == (9.0, 3)
        assert settings["verify"] is False


@every_way
@pytest.mark.parametrize("of_the_original", [None, "token-of-the-original"])
def test_a_client_without_a_token_takes_that_of_where_it_goes(
    of_the_original: str | None, copied: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAYWARD_TOKEN", raising=False)
    if of_the_original is not None:
        monkeypatch.setenv("RAYWARD_TOKEN", of_the_original)
    with stub() as server:
        clients = [RewardClient(server.url), RewardClient(server.url, token="")]
        assert b"token-of" not in pickle.dumps(clients)
        monkeypatch.setenv("RAYWARD_TOKEN", SECRET)
        for client in clients:
            sync_rewards(copied(client))
        sent = [got.headers.get("authorization") for got in server.received]
    assert sent == [f"Bearer {SECRET}", None]


@every_way
@pytest.mark.parametrize("kind", [RewardClient, AsyncRewardClient])
def test_a_context_of_tls_has_no_copy(kind: Any, copied: Callable[[Any], Any]) -> None:
    client = kind("https://127.0.0.1:1", verify=ssl.create_default_context())
    with pytest.raises(TypeError, match=r"SSLContext cannot be .* file of authorities as verify="):
        copied(client)


@every_way
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_copy_of_a_reward_function_for_trl_scores(
    asynchronous: bool, copied: Callable[[Any], Any]
) -> None:
    with stub() as server:
        function = reward_function(server.url, name="ours", asynchronous=asynchronous)
        found = copied(function)
        got = found(prompts=["p", "p"], completions=["x", "xyz"], label=[1, 2])
        assert (asyncio.run(got) if asynchronous else got) == [1.0, 3.0]
        assert found.__name__ == "ours"


@every_way
def test_copies_of_the_other_adapters_score_by_the_client_of_their_process(
    copied: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with stub() as server:
        monkeypatch.setenv(scorers.URL_VARIABLE, server.url)
        information = {"prompt": "p"}
        assert copied(verl.compute_score)("", "xyz", "", information)["score"] == 3.0
        assert copied(openrlhf.reward_func)(["xyz"], ["p"], [None])["rewards"].tolist() == [3.0]
        step, environment = copied(RewardStep()), copied(RewardEnvironment({}))
        monkeypatch.delenv(scorers.URL_VARIABLE)
        step.init([{"role": "user", "content": "p"}])
        assert step.step("xyz")["reward"] == 3.0
        log = [{"role": "user", "content": "p"}, {"role": "assistant", "content": "xyz"}]
        assert environment.step([log], [None]).rewards.tolist() == [3.0]
        assert len({got.connection for got in server.received}) == 1


def test_the_file_of_openrlhf_can_be_sent_to_another_process() -> None:
    """A module that is loaded by its path, which only cloudpickle takes."""
    spec = importlib.util.spec_from_file_location("reward_func", openrlhf.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function = pickle.loads(cloudpickle.dumps(module.reward_func))
    with stub() as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv(scorers.URL_VARIABLE, server.url)
        assert function(["xyz"], ["p"], [None])["rewards"].tolist() == [3.0]
