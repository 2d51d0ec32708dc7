"""Start or join a Ray cluster, and say at once when it is too small."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import ray

from reward_actor import ray_internals, terminal
from reward_actor.ray_internals import REACHABLE_VARIABLE

_LISTENER_TIMEOUT_S = 5.0
_FREE_TIMEOUT_S = 10.0


def connect(
    num_cpus_needed: float,
    num_gpus_needed: float = 0.0,
    address: str | None = None,
    *,
    log_to_driver: bool = True,
) -> None:
    """Join the cluster at `address` (or $RAY_ADDRESS), or start a private one on this machine.

    A private cluster listens on 127.0.0.1 only (where $RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER does not
    say otherwise), asks for Ray's token on its ports and ends with this process. Its
    logical CPUs are never fewer than `num_cpus_needed`: the actors here wait more than they
    compute, and two real cores would otherwise be too few for Ray's bookkeeping. `log_to_driver`
    prints what workers and actors print; in a command, their standard output
    only (`reward_actor.terminal`). Does nothing when this process is
    connected already. Raises ValueError if there is no cluster at the address or a private one has
    too few GPUs.
    """
    if ray.is_initialized():
        return
    address = address or os.environ.get("RAY_ADDRESS")
    said = f"joining the Ray cluster at {address}" if address else "starting Ray"
    with terminal.phase(said), _imports_without_this_directory():
        _connect(num_cpus_needed, num_gpus_needed, address, log_to_driver)
    if log_to_driver and terminal.is_command():
        ray_internals.take_worker_lines()


@contextlib.contextmanager
def _imports_without_this_directory() -> Iterator[None]:
    """Ray lets its workers look for modules first where its driver is started; of a command that is
    anywhere, perhaps with a trainer.py."""
    with contextlib.chdir(terminal.ROOT) if terminal.is_command() else contextlib.nullcontext():
        yield


def _connect(
    num_cpus_needed: float, num_gpus_needed: float, address: str | None, log_to_driver: bool
) -> None:
    take_loopback_as_it_is()
    if address:
        # A cluster of `rayward serve` asks for the token; one without authentication ignores it.
        ray_internals.silence_authentication()
        ray_internals.look_for_token()
        _require_listener(address)
        try:
            ray.init(address=address, logging_level=logging.WARNING, log_to_driver=log_to_driver)
        except (ConnectionError, RuntimeError) as error:
            raise _no_answer(address, error) from error
        return
    # Anyone who reaches a Ray port without authentication can run code (CVE-2023-48022). Ray turns
    # its token on for a cluster that it starts here, unless RAY_AUTH_MODE says otherwise.
    ray_internals.silence_authentication()
    os.environ.setdefault(REACHABLE_VARIABLE, "0")
    if os.environ[REACHABLE_VARIABLE] == "0":
        os.environ.setdefault("VLLM_HOST_IP", "127.0.0.1")  # its engines' own ports
    try:
        ray.init(
            # Ray would otherwise join a cluster that happens to run on this machine
            address="local",
            num_cpus=max(os.cpu_count() or 1, math.ceil(num_cpus_needed)),
            include_dashboard=False,
            logging_level=logging.WARNING,
            log_to_driver=log_to_driver,
        )
    except Exception as error:  # Ray says nothing narrower of a node that is not up in 30 seconds
        ray.shutdown()
        raise ValueError(_did_not_start(error)) from error
    token_file = Path.home() / ".ray" / "auth_token"
    if token_file.exists():
        token_file.chmod(0o600)  # Ray leaves a new token readable for everybody on the machine
    if num_gpus_needed > ray.cluster_resources().get("GPU", 0):
        found = ray.cluster_resources().get("GPU", 0)
        ray.shutdown()
        raise ValueError(_too_small({"GPU": num_gpus_needed}, {"GPU": found}))


def take_loopback_as_it_is() -> None:
    """Let this process join a cluster that listens on 127.0.0.1 only."""
    if REACHABLE_VARIABLE not in os.environ:
        ray_internals.keep_loopback()


def _require_listener(address: str) -> None:
    """Raise ValueError if nothing listens at host:port; Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():  # "auto" and "local" are found by Ray
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_LISTENER_TIMEOUT_S).close()
    except OSError as error:
        raise _no_answer(address, error) from error


def _did_not_start(error: Exception) -> str:
    lines = str(error).strip().rstrip(".").splitlines() or [type(error).__name__]
    return (
        f"Ray did not start on this machine: {lines[0]}. If it is slow or busy, run the command "
        "again when it is not, or start Ray by itself (ray start --head) and set "
        "RAY_ADDRESS=127.0.0.1:6379. Ray's own logs are in /tmp/ray/session_latest/logs."
    )


def _no_answer(address: str, error: Exception) -> ValueError:
    return ValueError(
        f"no Ray cluster answers at {address!r}: {error}. Start one (ray start --head) or leave "
        "the address away to use this machine alone."
    )


def capacity(name: str) -> float:
    """How much of a resource the cluster has, or may grow to if it scales by itself."""
    now = float(ray.cluster_resources().get(name, 0.0))
    return max(now, float(ray_internals.may_grow_to().get(name, 0.0)))


def require_resources(bundles: Sequence[dict[str, float]]) -> None:
    """Raise ValueError unless the cluster can hold all bundles beside what runs on it already.

    Compares totals, so bundles that fit together but on no single node are not noticed. A cluster
    that scales by itself is asked for what it may grow to.
    """
    asked: dict[str, float] = {}
    for bundle in bundles:
        for name, amount in bundle.items():
            asked[name] = asked.get(name, 0.0) + amount
    there = {name: capacity(name) for name in asked}
    if any(there[name] < asked[name] for name in asked):
        raise ValueError(_too_small(asked, there))
    deadline = time.monotonic() + _FREE_TIMEOUT_S  # what just ended is given back with a delay
    while not ray_internals.may_grow_to():
        free = {name: float(ray.available_resources().get(name, 0.0)) for name in asked}
        if all(free[name] >= asked[name] for name in asked):
            return
        if time.monotonic() > deadline:
            raise ValueError(_too_small(asked, there, free))
        time.sleep(0.2)


def _too_small(
    asked: dict[str, float], there: dict[str, float], free: dict[str, float] | None = None
) -> str:
    def listed(amounts: dict[str, float]) -> str:
        return ", ".join(f"{amounts[name]:g} {name}" for name in sorted(asked))

    taken = "" if free is None else f", of which {listed(free)} free"
    return (
        f"the Ray cluster is too small: {listed(asked)} asked for, {listed(there)} there{taken}. "
        "Use fewer workers or replicas, less of each, or a larger cluster."
    )
