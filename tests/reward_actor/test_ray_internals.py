"""The private names of Ray that are used are where they were, and do what they did."""

from __future__ import annotations

import asyncio

from reward_actor import ray_internals as internals
from reward_actor.client.handle import DEFAULT_APP_NAME


def test_the_key_value_store_keeps_what_was_put_first(ray_cluster: None) -> None:
    assert not internals.kv_put("test:a", "1")
    assert internals.kv_put("test:a", "2", overwrite=False), "it was there"
    assert internals.kv_get("test:a") == b"1"
    internals.kv_put("test:b", "3")
    assert sorted(internals.kv_keys("test:")) == [b"test:a", b"test:b"]
    internals.kv_delete("test:", by_prefix=True)
    assert internals.kv_keys("test:") == []
    assert internals.kv_get("test:a") is None


def test_a_node_knows_its_folders(ray_cluster: None) -> None:
    session = internals.session_dir()
    assert session is not None
    assert (session / "logs").samefile(internals.logs_dir())
    assert internals.may_grow_to() == {}, "this cluster does not scale by itself"


def test_serve_says_where_it_listens(service: str) -> None:
    options = internals.serve_http_options()
    assert service == f"http://{options.host}:{options.port}"


def test_every_replica_answers_a_broadcast(service: str) -> None:
    from ray.serve.handle import DeploymentHandle

    handle = DeploymentHandle("RewardModel", DEFAULT_APP_NAME)  # not the one that Serve keeps

    async def ask() -> list[str]:
        internals.route_in_this_loop(handle)
        results = await internals.broadcast(handle, "describe")
        return [(await result.get_async()).replica for result in results]

    assert len(set(asyncio.run(ask()))) == 2
