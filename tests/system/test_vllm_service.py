"""Engine vllm behind a real service: the offline rewards on every route, nothing left behind."""

from __future__ import annotations

import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import psutil
import pytest
import torch
from exports import make_export
from isolation import environment_for_a_cluster, free_port
from missing import CPU
from processes import descendants, titled

from reward_actor import Group, RewardClient, RewardHandle, RewardScorer, binary
from reward_actor.groups import GroupScores

if TYPE_CHECKING:
    from nursery import Nursery

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason=f"missing: {CPU}")

GROUPS = [
    Group("Name two fruits.", ["An apple and a pear.", "A hammer.", "word " * 500]),
    Group([{"role": "user", "content": "Hi."}], ["Hello, how can I help?"]),
]
IDS = [Group(prompt_ids=[5, 6, 7], completion_ids=[[8], [9, 10]])]


@pytest.fixture(scope="module")
def registry(export_dir: Path, base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("registry")
    shutil.copytree(export_dir, root / "first")
    make_export(base_model, root / "second", seed=5, mean=0.5, std=2.0)
    return root


@pytest.fixture(scope="module")
def url(vllm_engine: None, service: str, registry: Path) -> Iterator[str]:
    """A second application in the cluster of the shared one."""
    from ray import serve

    from serve.app import build, resolve
    from serve.config import ServeConfig

    config = ServeConfig(
        model=str(registry / "first"),
        engine="vllm",
        device="cpu",
        cpus_per_replica=0.5,
        threads_per_replica=1,
        registry=str(registry),
    )
    serve.run(build(resolve(config), use_gpu=False), name="vllm", route_prefix="/vllm")
    yield service + "/vllm"
    processes = engine_processes()
    assert processes
    serve.delete("vllm")
    wait_for_end(processes)


def replica() -> psutil.Process | None:
    return next(iter(titled("ray::ServeReplica:vllm:RewardModel")), None)


def engine_processes() -> set[psutil.Process]:
    """Engine cores and workers of the replica."""
    parent = replica()
    if parent is None:
        return set()
    return engines_of(parent)


def engines_of(process: psutil.Process) -> set[psutil.Process]:
    return {child for child in descendants(process) if child.name().startswith("VLLM::")}


def wait_for_end(processes: set[psutil.Process], timeout_s: float = 30) -> None:
    _, alive = psutil.wait_procs(list(processes), timeout=timeout_s)
    assert [p for p in alive if p.status() != psutil.STATUS_ZOMBIE] == []


def assert_equal_scores(served: list[GroupScores], expected: list[GroupScores]) -> None:
    for ours, theirs in zip(served, expected, strict=True):
        for reward, right in zip(ours.raw_scores, theirs.raw_scores, strict=True):
            assert reward == (None if right is None else pytest.approx(right, rel=1e-5, abs=1e-5))
        for reward, right in zip(ours.rewards, theirs.rewards, strict=True):
            assert reward == (None if right is None else pytest.approx(right, rel=1e-5, abs=1e-5))
        assert ours.num_tokens == theirs.num_tokens
        assert ours.errors == theirs.errors
        assert ours.model_version == theirs.model_version


def test_every_route_gives_the_offline_rewards(url: str, export_dir: Path) -> None:
    offline = RewardScorer.from_pretrained(export_dir, "cpu")
    groups = [*GROUPS, *IDS]
    expected = offline.score(groups, token_rewards=True)
    with RewardClient(url) as client:
        assert_equal_scores(client.score_groups(groups), expected)
        with_tokens = client.score_groups(groups, token_rewards=True)
        assert_equal_scores(with_tokens, expected)
        info = client.info()
    assert_equal_scores(RewardHandle("vllm").score_groups(groups), expected)
    for ours, theirs in zip(with_tokens, expected, strict=True):
        assert ours.token_rewards is not None
        assert theirs.token_rewards is not None
        for row, right in zip(ours.token_rewards, theirs.token_rewards, strict=True):
            assert row == (None if right is None else pytest.approx(right, rel=1e-5, abs=1e-5))
    reply = httpx.post(
        url + "/v1/score",
        content=binary.encode_request(IDS),
        headers={"Content-Type": binary.MEDIA_TYPE},
        timeout=60,
    )
    assert_equal_scores(binary.decode_reply(reply.content, [2])[1], expected[2:])
    assert (info.engine, info.path, info.dtype) == ("vllm", "vllm", "float32")
    assert info.versions["vllm"].startswith("0.")
    assert info.model_version == offline.model_version


@pytest.mark.long
def test_a_killed_engine_costs_no_request(url: str, export_dir: Path) -> None:
    """The replica reports that it lost its engine, is replaced, and the ingress asks again."""
    expected = RewardScorer.from_pretrained(export_dir, "cpu").score(IDS)
    before = engine_processes()
    [core] = [process for process in before if process.name().startswith("VLLM::EngineCor")]
    scores: list[GroupScores] = []

    def ask() -> None:
        with RewardClient(url, timeout_s=115) as client:
            scores.extend(client.score_groups(IDS))

    core.send_signal(signal.SIGKILL)
    asking = threading.Thread(target=ask)
    asking.start()
    asking.join()
    assert_equal_scores(scores, expected)
    wait_for_end(before)
    assert len(engine_processes()) == 2


@pytest.mark.long
def test_an_engine_ends_with_a_killed_replica(url: str, export_dir: Path) -> None:
    before = engine_processes()
    process = replica()
    assert process is not None
    assert len(before) == 2
    process.send_signal(signal.SIGKILL)
    wait_for_end(before, timeout_s=10)
    with RewardClient(url, timeout_s=115) as client:
        expected = RewardScorer.from_pretrained(export_dir, "cpu").score(IDS)
        assert_equal_scores(client.score_groups(IDS), expected)


@pytest.mark.long
def test_asleep_it_has_no_engine_and_awake_another(url: str, export_dir: Path) -> None:
    """On a CPU, where vLLM has no sleep mode of its own."""
    expected = RewardScorer.from_pretrained(export_dir, "cpu").score(IDS)
    before = engine_processes()
    with RewardClient(url, timeout_s=115) as client:
        assert client.sleep().asleep
        wait_for_end(before)
        assert engine_processes() == set()
        assert not client.wake().asleep
        assert len(engine_processes()) == 2
        assert_equal_scores(client.score_groups(IDS), expected)


@pytest.mark.long
def test_a_hot_swap_ends_the_engine_before(url: str, registry: Path) -> None:
    expected = RewardScorer.from_pretrained(registry / "second", "cpu").score(IDS)
    before = engine_processes()
    reply = httpx.post(url + "/v1/admin/models", json={"model": "second"}, timeout=200)
    assert reply.status_code == 200, reply.text
    assert len(engine_processes()) == 4, "both, until nobody asks for the one before"
    with RewardClient(url) as client:
        assert_equal_scores(client.score_groups(IDS), expected)
        wait_for_end(before, timeout_s=90)
        assert_equal_scores(client.score_groups(IDS), expected)


@pytest.mark.long
@pytest.mark.process
@pytest.mark.usefixtures("vllm_engine")
def test_the_front_door_serves_with_vllm(nursery: Nursery, export_dir: Path) -> None:
    port = free_port()
    command = [nursery.python, "-m", "rayward", "serve", str(export_dir), "--engine", "vllm"]
    command += ["--port", str(port), "--device", "cpu", "--threads-per-replica", "1"]
    environment = environment_for_a_cluster()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as server:
        try:
            assert server.stdout is not None
            lines = []
            while not any(line.startswith("ready") for line in lines):
                lines.append(server.stdout.readline())
                assert lines[-1], f"it ended: {lines}"
            engines = engines_of(psutil.Process(server.pid))
            assert len(engines) == 2
            with RewardClient(f"http://127.0.0.1:{port}") as client:
                expected = RewardScorer.from_pretrained(export_dir, "cpu").score(GROUPS)
                assert_equal_scores(client.score_groups(GROUPS), expected)
            server.send_signal(signal.SIGTERM)
            assert server.wait(60) == 0
            wait_for_end(engines)
        finally:
            server.kill()


def test_an_ensemble_is_refused_before_anything_starts(
    export_dir: Path, registry: Path, tmp_path: Path
) -> None:
    from reward_actor.model.ensemble import write_ensemble
    from serve.app import app

    write_ensemble(tmp_path / "both", [export_dir, registry / "second"])
    with pytest.raises(ValueError, match="engine vllm serves one model"):
        app({"model": str(tmp_path / "both"), "engine": "vllm", "device": "cpu"})
