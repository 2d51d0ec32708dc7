"""Starting the service: by `serve run`, by the front door, and what is refused with a reason."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest
from isolation import environment_for_a_cluster, free_port

from reward_actor import AsyncRewardHandle, RewardClient, RewardHandle
from reward_actor.model.manifest import write_manifest

if TYPE_CHECKING:
    from nursery import Nursery


@pytest.mark.process
def test_serve_run_starts_the_same_application(
    nursery: Nursery, service: str, export_dir: Path
) -> None:
    import ray
    from ray import serve

    address = ray.get_runtime_context().gcs_address
    command = [
        nursery.python,
        str(Path(sys.executable).parent / "serve"),
        "run",
        "--address",
        address,
    ]
    command += ["--name", "second", "--route-prefix", "/second", "serve.app:app"]
    command += [
        f"model={export_dir}",
        "device=cpu",
        "cpus_per_replica=0.5",
        "threads_per_replica=1",
    ]
    environment = {**os.environ, "RAY_AUTH_MODE": "token"}
    with subprocess.Popen(command, env=environment, start_new_session=True) as process:
        try:
            with RewardClient(service + "/second", timeout_s=90) as client:
                wait_until_ready(service + "/second", process)
                assert client.score("Hi.", ["Yes?"]).errors == [None]
            assert RewardHandle("second").score("Hi.", ["Yes?"]).errors == [None]
            for kind in (RewardHandle, AsyncRewardHandle):  # of two, the one that is called so
                assert kind()._app_name == "rayward"
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # Ctrl-C would end all of Serve, ours too
            serve.delete("second")


def wait_until_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 90
    while httpx.get(url + "/ready", timeout=30).status_code != 200:
        assert process.poll() is None, "it ended early"
        assert time.monotonic() < deadline, "it did not become ready"
        time.sleep(0.5)


def front_door(python: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """On a machine of its own, as far as its environment tells: not with this cluster's ports."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY")}
    command = [python, "-m", "rayward", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=own)


REFUSED = {
    "{base}": "no trained reward head",
    "/nowhere": "is not a directory",
    "{export} --port {port}": "Address already in use, by process ",
    "{export} --num-replicas 0": "error: --num-replicas is '0'",
    "{export} --num-replica 2": "did you mean --num-replicas?",
    "{export} --ray-address 127.0.0.1:1": "no Ray cluster answers",
}


@pytest.fixture(scope="module")
def refused(
    nursery: Nursery, service: str, base_model: Path, export_dir: Path
) -> dict[str, subprocess.CompletedProcess[str]]:
    """What `rayward serve` does with each of these arguments, two at a time."""
    port = service.rsplit(":", 1)[1]

    def serving(arguments: str) -> subprocess.CompletedProcess[str]:
        filled = arguments.format(base=base_model, export=export_dir, port=port)
        return front_door(nursery.python, "serve", *filled.split())

    with ThreadPoolExecutor(2) as both:
        return dict(zip(REFUSED, both.map(serving, REFUSED), strict=True))


@pytest.mark.process
@pytest.mark.parametrize("arguments", REFUSED)
def test_serving_what_cannot_be_served_says_why(
    refused: dict[str, subprocess.CompletedProcess[str]], arguments: str
) -> None:
    done = refused[arguments]
    assert done.returncode == 2
    assert REFUSED[arguments] in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.process
def test_a_model_that_fails_its_golden_samples_is_not_served(
    nursery: Nursery, export_dir: Path, tmp_path: Path
) -> None:
    """A service of its own: the replica refuses the model, and the command says why and ends."""
    from isolation import free_port

    bad = Path(shutil.copytree(export_dir, tmp_path / "bad"))
    contract = json.loads((bad / "scoring_contract.json").read_text())
    contract["golden"]["raw_scores"]["float32"][0] += 0.1
    (bad / "scoring_contract.json").write_text(json.dumps(contract))
    write_manifest(bad)  # without it its digests say so first
    done = front_door(nursery.python, "serve", str(bad), "--port", str(free_port()))
    assert done.returncode == 2
    assert "golden sample 0 scores" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_second_service_in_one_cluster_is_refused(service: str, export_dir: Path) -> None:
    from isolation import free_port

    from serve.app import start
    from serve.config import ServeConfig

    config = ServeConfig(model=str(export_dir), device="cpu", cpus_per_replica=0.5)
    with pytest.raises(ValueError, match=r"Ray Serve listens on 127\.0\.0\.1"):
        start(config, port=free_port())


def test_a_cluster_that_is_too_small_is_said_at_once(ray_cluster: None, export_dir: Path) -> None:
    from isolation import free_port

    from serve.app import start
    from serve.config import ServeConfig

    config = ServeConfig(model=str(export_dir), device="cpu", num_replicas=3, cpus_per_replica=100)
    with pytest.raises(ValueError, match=r"too small: 300\.25 CPU asked for, 16 CPU there"):
        start(config, port=free_port())


def test_an_unknown_setting_names_the_nearest(export_dir: Path) -> None:
    from serve.app import app

    with pytest.raises(ValueError, match="unknown key 'num_replica'; did you mean 'num_replicas'"):
        app({"model": str(export_dir), "num_replica": 2})
    with pytest.raises(ValueError, match="model is required"):
        app({})


ON_A_TAKEN_PORT = """
import sys
from serve.haproxy import settings
taken = int(sys.argv.pop(1))
free_ports = settings.free_ports
settings.free_ports = lambda count: [taken, *free_ports(count - 1)]
import rayward
sys.exit(rayward.main())
"""


@pytest.mark.process
def test_what_haproxy_complains_of_is_shown(nursery: Nursery, export_dir: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        command = [nursery.python, "-c", ON_A_TAKEN_PORT, str(taken), "serve", str(export_dir)]
        done = subprocess.run(
            [*command, "--device", "cpu", "--port", str(free_port())],
            env=environment_for_a_cluster(),
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode != 0
    reason = rf"error: Ray Serve did not start: HAProxy: Binding .* \[127.0.0.1:{taken}\]"
    assert re.search(reason, done.stderr), done.stderr[-2000:]
