"""A service that is watched: its metrics where Prometheus finds them, its live rewards, its log."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from exports import make_export

from reward_actor import Group, RewardClient, RewardHandle, RewardScorer
from reward_actor.contract import HeldOut
from reward_actor.errors import RewardServiceError
from reward_actor.ray_internals import session_dir

CANARY = "canary-in-a-coal-mine"
NAME = "watched"


def groups(seed: int, count: int) -> list[Group]:
    """Four completions each, of different lengths, after a common prompt."""
    drawn = np.random.default_rng(seed)
    return [
        Group(
            prompt_ids=[5, *drawn.integers(5, 300, 20).tolist()],
            completion_ids=[
                drawn.integers(5, 300, int(length)).tolist() for length in drawn.integers(1, 20, 4)
            ],
        )
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def scorer(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> RewardScorer:
    return RewardScorer.from_pretrained(
        make_export(base_model, tmp_path_factory.mktemp("plain") / "rm", seed=11), "cpu"
    )


@pytest.fixture(scope="module")
def watched_dir(
    base_model: Path, scorer: RewardScorer, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The same model, which tells how it scores samples of this kind, and normalises."""
    results = scorer.score(groups(1, 300))
    raw = np.array([score for result in results for score in result.raw_scores], np.float64)
    lengths = np.array([n for result in results for n in result.num_tokens])
    held_out = HeldOut(
        np.quantile(raw, np.linspace(0, 1, 101)).tolist(),
        float(np.corrcoef(raw, lengths)[0, 1]),
        len(raw),
    )
    return make_export(
        base_model,
        tmp_path_factory.mktemp("watched") / NAME,
        seed=11,
        held_out=held_out,
        mean=float(raw.mean()),
        std=float(raw.std()),
    )


@pytest.fixture(scope="module")
def url(service: str, watched_dir: Path) -> Iterator[str]:
    """A second application in the cluster of the shared one, behind two ingresses."""
    from ray import serve

    from serve.app import build, resolve
    from serve.config import ServeConfig

    config = ServeConfig(
        model=str(watched_dir),
        device="cpu",
        cpus_per_replica=0.5,
        threads_per_replica=1,
        num_ingress=2,
        max_request_samples=400,
        error_reward=-10.0,
        access_log=True,
    )
    serve.run(build(resolve(config), use_gpu=False), name=NAME, route_prefix=f"/{NAME}")
    yield f"{service}/{NAME}"
    serve.delete(NAME)


def score(url: str, batch: list[Group]) -> None:
    """In requests of ten groups, so that every ingress gets its share."""
    with RewardClient(url) as client:
        for start in range(0, len(batch), 10):
            client.score_groups(batch[start : start + 10])


def monitored(url: str, num_rewards: int) -> dict[str, object]:
    """What is said of the served model once so many rewards are known at whoever answers."""
    deadline = time.monotonic() + 20
    while True:
        models = httpx.get(f"{url}/v1/monitor").json()["models"]
        if models[0]["num_rewards"] == num_rewards:
            return dict(models[0])
        assert time.monotonic() < deadline, models
        time.sleep(0.5)


def test_hacking_is_seen_as_it_begins(url: str, scorer: RewardScorer) -> None:
    """First what the model was measured on, then of that only what it likes best."""
    score(url, groups(2, 150))
    usual = monitored(url, 600)
    assert usual["warnings"] == []
    assert usual["drift"] < 0.1
    assert usual["mean"] == pytest.approx(0, abs=0.2)
    assert usual["std"] == pytest.approx(1, abs=0.2)
    assert usual["share_at_extremes"] < 0.06
    assert usual["live"]["edges"] == usual["held_out"]["edges"]
    assert httpx.get(f"{url}/info").json()["warnings"] == []

    candidates = groups(3, 700)
    results = scorer.score(candidates)
    best = [
        Group(prompt_ids=group.prompt_ids, completion_ids=[group.completion_ids[index]] * 4)
        for group, result in zip(candidates, results, strict=True)
        if result.raw_scores[index := int(np.argmax(result.raw_scores))] > 0
    ]
    kept = sorted(
        best,
        key=lambda group: scorer.score([group])[0].raw_scores[0],
        reverse=True,
    )[:200]
    score(url, kept)
    hacked = monitored(url, 600 + 4 * len(kept))
    assert {"drift"} <= {warning["type"] for warning in hacked["warnings"]}
    assert hacked["drift"] > 0.25
    assert hacked["mean"] > usual["mean"]
    for _ in range(4):  # whichever ingress it is
        told = httpx.get(f"{url}/info").json()["warnings"]
        assert [warning["type"] for warning in told] == [w["type"] for w in hacked["warnings"]]


Samples = dict[str, dict[tuple[tuple[str, str], ...], float]]

OURS = ("route", "status", "type", "stage", "outcome", "model_version", "replica", "le")


def scraped() -> tuple[Samples, str]:
    """By name: values by those labels that are ours, summed over the processes."""
    from serve.monitoring.metrics import targets

    found: Samples = {}
    [target] = targets()
    text = httpx.get(f"http://{target}/metrics", timeout=30).text
    for line in text.splitlines():
        match = re.fullmatch(r"(ray_rayward_\w+)\{(.*)\} (\S+)", line)
        if match is None:
            continue
        labels = dict(re.findall(r'(\w+)="([^"]*)"', match[2]))
        key = tuple((name, labels[name]) for name in OURS if name in labels)
        values = found.setdefault(match[1], {})
        values[key] = values.get(key, 0) + float(match[3])
    return found, text


def test_prometheus_finds_every_metric(url: str, scorer: RewardScorer) -> None:
    from serve.monitoring.metrics import METRICS, targets

    session = session_dir()
    assert session is not None
    [told] = json.loads((session / "prom_metrics_service_discovery.json").read_text())
    assert told["targets"] == targets()

    assert httpx.get(f"{url}/{CANARY}").status_code == 404
    assert httpx.post(f"{url}/v1/score", content=f'{{"{CANARY}').status_code == 422
    assert httpx.post(f"{url}/v1/admin/models", json={"model": CANARY}).status_code == 404
    too_long = {"prompt": CANARY * 1000, "completions": ["a"]}
    assert httpx.post(f"{url}/v1/score", json={"groups": [too_long]}).status_code == 200
    answered = httpx.post(f"{url}/get_reward", json={"query": ["a", CANARY * 1000, CANARY * 999]})
    assert answered.json()["rewards"][1:] == [-10.0, -10.0]
    too_many = [Group(prompt_ids=[5], completion_ids=[[6]] * 401)]
    with RewardClient(url) as client, pytest.raises(RewardServiceError, match="401"):
        client.score_groups(too_many)
    with pytest.raises(RewardServiceError, match="401"):
        RewardHandle(NAME).score_groups(too_many)
    score(url, groups(4, 150))

    answers = {
        (("route", route), ("status", status))
        for route, status in (("other", "404"), ("/v1/score", "422"), ("/v1/score", "413"))
    }
    deadline = time.monotonic() + 60  # Ray reports every ten seconds
    while True:
        found, text = scraped()
        missing = {name for metric in METRICS for name in metric.shown} - found.keys()
        # Counted over all applications of the cluster; one refusal is of HTTP, one of a handle.
        refusals = found.get("ray_rayward_rejections_total", {})
        refused = refusals.get((("type", "too_many_tokens"),), 0)
        requests = found.get("ray_rayward_requests_total", {})
        unseen = [answer for answer in answers if answer not in requests]
        if not missing and not unseen and refused >= 2:
            break
        assert time.monotonic() < deadline, (missing, unseen, refused)
        time.sleep(0.5)
    for metric in METRICS:
        for name in metric.shown:
            for labels in found[name]:
                assert {key for key, _ in labels} - {"le"} == set(metric.labels), name
    assert found["ray_rayward_sample_errors_total"][(("type", "too_long"),)] >= 1
    assert found["ray_rayward_error_rewards_total"][(("type", "too_long"),)] >= 2
    assert found["ray_rayward_swaps_total"][(("outcome", "not_found"),)] >= 1
    given, computed, saved = (
        sum(found[f"ray_rayward_{name}_total"].values())
        for name in ("tokens", "computed_tokens", "saved_tokens")
    )
    assert given == computed + saved
    assert saved > 150 * 3 * 20, "three of four completions share their prompt with the first"
    label = httpx.get(f"{url}/info").json()["model_version"].partition(":")[2][:12]
    assert (("model_version", label),) in found["ray_rayward_reward_drift"]
    assert (("model_version", label),) in found["ray_rayward_model_info"]
    assert CANARY not in text


def log_line(request_id: str) -> dict[str, object]:
    """The one of this request, which is written once its answer is sent."""
    session = session_dir()
    assert session is not None
    deadline = time.monotonic() + 10
    while True:
        files = (session / "logs" / "serve").glob("rayward_requests_*.jsonl")
        text = "".join(file.read_text() for file in files)
        assert CANARY not in text
        lines = [json.loads(line) for line in text.splitlines()]
        found = [line for line in lines if line["request_id"] == request_id]
        if found:
            [line] = found
            return dict(line)
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_request_is_found_again_by_its_id(url: str) -> None:
    body = {"groups": [{"prompt": CANARY, "completions": [CANARY, "b"]}]}
    reply = httpx.post(f"{url}/v1/score", json=body, headers={"X-Request-Id": "my-id_7"})
    assert reply.headers.get_list("x-request-id") == ["my-id_7"]
    line = log_line("my-id_7")
    assert (line["route"], line["status"], line["samples"]) == ("/v1/score", 200, 2)
    assert line["tokens"] == sum(reply.json()["results"][0]["num_tokens"])
    assert line["model_version"] == reply.json()["model_version"]


@pytest.mark.parametrize("given", ["", "no spaces", "x" * 65, '{"a":1}', "é".encode()])
def test_an_id_that_is_none_is_not_sent_back(url: str, given: str | bytes) -> None:
    reply = httpx.get(f"{url}/health", headers={"X-Request-Id": given})
    [made] = reply.headers.get_list("x-request-id")
    assert re.fullmatch(r"[A-Za-z0-9_-]{1,64}", made)
    assert made != given
    assert log_line(made)["route"] == "/health"
