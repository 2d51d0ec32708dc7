"""The private names of Ray that are used are where they were, and do what they did."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys

import pytest

from reward_actor import ray_internals as internals
from reward_actor.client.handle import DEFAULT_APP_NAME


def test_loopback_stays_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private import ray_constants, services, worker

    monkeypatch.setattr(worker, "_global_node", None)  # whose address would be given
    monkeypatch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", True)
    internals.keep_loopback()
    assert services.resolve_ip_for_localhost("127.0.0.1") == "127.0.0.1"
    assert ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR == internals.REACHABLE_VARIABLE


@pytest.mark.process
def test_a_token_that_is_there_is_taken_in_silence() -> None:
    """In a process of its own: Ray keeps a token for the life of one."""
    script = (
        "import os; from reward_actor import ray_internals as internals; "
        "internals.silence_authentication(); internals.look_for_token(); "
        "print(os.environ['RAY_AUTH_MODE'])"
    )
    environment = {**os.environ, "RAY_AUTH_TOKEN": "0" * 32}
    environment.pop("RAY_AUTH_MODE", None)
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "token"
    assert "authentication" not in done.stderr


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


def test_a_cluster_that_runs_has_lost_none_of_its_processes(
    ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray._private.worker import _global_node as node

    assert {"gcs_server", "raylet"} <= node.all_processes.keys()
    assert internals.ended_processes() == []
    monkeypatch.setattr(node, "dead_processes", lambda: [("raylet", None)])
    assert internals.ended_processes() == ["raylet"]


def test_serve_says_where_it_listens(service: str) -> None:
    options = internals.serve_http_options()
    assert service == f"http://{options.host}:{options.port}"


def test_every_replica_answers_a_broadcast(service: str) -> None:
    from ray.serve.handle import DeploymentHandle

    handle = DeploymentHandle("RewardModel", DEFAULT_APP_NAME)  # not the one that Serve keeps
    other = DeploymentHandle("RewardModel", DEFAULT_APP_NAME)

    async def ask() -> list[str]:
        internals.route_in_this_loop(handle)
        assert not handle._is_router_running_in_separate_loop()
        results = await internals.broadcast(handle, "describe")
        return [(await result.get_async()).replica for result in results]

    assert len(set(asyncio.run(ask()))) == 2
    assert internals.route_in_own_loop(handle) is not handle, "its loop has ended"
    assert internals.route_in_own_loop(other) is other
    assert other._is_router_running_in_separate_loop()


def test_lines_of_workers_are_ours_and_what_else_they_print_is_not(
    ray_cluster: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray._private.ray_logging import global_worker_stdstream_dispatcher as dispatcher

    monkeypatch.setattr(dispatcher, "handlers", [("ray_print_logs", print)])
    internals.take_worker_lines()
    for pid, is_err, line in [
        (7, False, "path: forest"),
        (7, True, "Failed to load"),
        ("raylet", False, "spilling"),
        ("autoscaler", False, "Autoscaler status"),
    ]:
        dispatcher.emit({"pid": pid, "is_err": is_err, "lines": [line], "ip": "127.0.0.1"})
    assert capsys.readouterr() == ("path: forest\n", "Failed to load\nspilling\n")
