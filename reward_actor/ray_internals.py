"""Every private name of Ray that `reward_actor` and `serve` use, as of Ray 2.60.

Each has a public function here that says what it is for; tests/reward_actor/test_ray_internals.py
fails when a new Ray has moved one. Ray Train's are in `trainer.ray_internals`.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reward_actor.terminal import say

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

NAMESPACE = "rayward"
"""Of what the service keeps in the key-value store of Ray's head."""

REACHABLE_VARIABLE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Ray's name for the setting; it holds on every system. 0: a node's address is 127.0.0.1."""


# ---- clusters


def look_for_token() -> None:
    """Take Ray's token from where Ray keeps it; by itself Ray does so only for a cluster that it
    finds by itself."""
    from ray._private.authentication.authentication_token_setup import (
        maybe_enable_token_auth_if_token_available,
    )

    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def silence_authentication() -> None:
    """Without Ray's warning that it asks for a token, which is what we want."""
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)


def keep_loopback() -> None:
    """Let 127.0.0.1 be 127.0.0.1: Ray replaces it by this machine's address in the network."""
    from ray._private import ray_constants

    ray_constants.ENABLE_RAY_CLUSTER = False


def take_worker_lines() -> None:
    """Print what Ray's processes print without Ray's prefix: their standard output, which is ours,
    to this one's, and all else to its standard error. Ray itself puts both on the terminal."""
    from ray._private.ray_logging import global_worker_stdstream_dispatcher as dispatcher

    def take(data: dict[str, Any]) -> None:
        if data.get("pid") == "autoscaler":  # its whole status, every five seconds
            return
        is_ours = not data["is_err"] and data.get("pid") != "raylet"
        for line in data["lines"]:
            say(line) if is_ours else print(line, file=sys.stderr)

    dispatcher.remove_handler("ray_print_logs")
    dispatcher.add_handler("ray_print_logs", take)


def may_grow_to() -> dict[str, float]:
    """The largest size of a cluster that scales by itself; empty for any other."""
    from ray._private.state import state

    return dict(state.get_max_resources_from_cluster_config() or {})


def ended_processes() -> list[str]:
    """Which of Ray's own processes that this one has started (gcs_server, raylet, ...) have ended
    since, though nobody asked them to."""
    from ray._private.worker import _global_node as node

    return [] if node is None else [name for name, _ in node.dead_processes()]


def session_dir() -> Path | None:
    """The folder of this node's session; None in a process that joined from outside."""
    from ray._private.worker import _global_node as node

    return None if node is None else Path(node.get_session_dir_path())


def logs_dir() -> Path:
    """Where Ray's processes of this node write their logs."""
    from ray._private.worker import _global_node as node

    assert node is not None, "only processes of a cluster have logs there"
    return Path(node.get_logs_dir_path())


# ---- the key-value store of Ray's head: it outlives every process of the service


def kv_put(key: str, value: str, *, overwrite: bool = True) -> bool:
    """Whether the key was there before; with `overwrite` off, nothing is written then."""
    from ray.experimental.internal_kv import _internal_kv_put

    return bool(_internal_kv_put(key, value, overwrite=overwrite, namespace=NAMESPACE))


def kv_get(key: str | bytes) -> bytes | None:
    from ray.experimental.internal_kv import _internal_kv_get

    value: bytes | None = _internal_kv_get(key, namespace=NAMESPACE)
    return value


def kv_keys(prefix: str) -> list[bytes]:
    from ray.experimental.internal_kv import _internal_kv_list

    return list(_internal_kv_list(prefix, namespace=NAMESPACE))


def kv_delete(key: str | bytes, *, by_prefix: bool = False) -> None:
    from ray.experimental.internal_kv import _internal_kv_del

    _internal_kv_del(key, del_by_prefix=by_prefix, namespace=NAMESPACE)


# ---- Ray Serve


def serve_http_options() -> Any:
    """`host` and `port` at which Ray Serve listens in this cluster."""
    from ray.serve.context import _get_global_client

    client: Any = _get_global_client()
    return client.http_config


def route_in_this_loop(handle: DeploymentHandle[Any]) -> None:
    """Let a handle's calls start in the loop that makes them: a loop of its own costs a hop of
    threads in each direction."""
    if not handle.is_initialized:
        handle._init(_run_router_in_separate_loop=False)


def route_in_own_loop(handle: DeploymentHandle[Any]) -> DeploymentHandle[Any]:
    """A handle for callers without a loop, or with one that ends before the process.

    Ray shares an application's handle with everybody in the process, and under
    RAY_SERVE_THROUGHPUT_OPTIMIZED its router would need a loop that runs already.
    """
    from ray.serve.handle import DeploymentHandle

    if handle.is_initialized and not handle._is_router_running_in_separate_loop():
        handle = DeploymentHandle(handle.deployment_name, handle.app_name)
    if not handle.is_initialized:
        handle._init(_run_router_in_separate_loop=True)
    return handle


async def broadcast(handle: DeploymentHandle[Any], method: str, *arguments: Any) -> list[Any]:
    """A pending result of every live replica. The public `results_async` gives no answer at all
    when one replica is late."""
    response = handle.broadcast(method, *arguments)
    return list(await response._fetch_replica_results_async())
