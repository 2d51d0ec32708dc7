"""Several replicas on one GPU: Ray places them so."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from isolation import environment_for_a_cluster

if TYPE_CHECKING:
    from nursery import Nursery

pytestmark = pytest.mark.process

PLACE = """
import sys

from serve.haproxy import settings as haproxy

haproxy.enable()
import ray
from ray import serve

from reward_actor import Group, RewardHandle
from serve.app import build, resolve
from serve.config import ServeConfig

ray.init(address="local", num_cpus=8, num_gpus=1, include_dashboard=False, log_to_driver=False)
serve.start(http_options={"host": "127.0.0.1"})
settings = {"device": "cpu", "cpus_per_replica": 0.5, "threads_per_replica": 1}
halves = ServeConfig(model=sys.argv[1], num_replicas=2, gpus_per_replica=0.5, **settings)
serve.run(build(resolve(halves), use_gpu=True), name="rayward", route_prefix="/")
scores = RewardHandle().score_groups([Group("Hi.", ["Yes?"])])
print("FREE", ray.available_resources().get("GPU", 0.0), scores[0].errors)
serve.shutdown()
ray.shutdown()
"""


def test_ray_places_two_replicas_on_one_gpu(nursery: Nursery, export_dir: Path) -> None:
    """On a logical GPU, in a cluster of its own."""
    done = subprocess.run(
        [nursery.python, "-c", PLACE, str(export_dir)],
        capture_output=True,
        text=True,
        timeout=180,
        env=environment_for_a_cluster(),
    )
    assert "FREE 0.0 [None]" in done.stdout, done.stderr[-2000:]
