"""Hot swaps and sleep on a real service: no error, no mixture, and nothing that does not deserve
it."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import psutil
import pytest
import torch
from exports import CORPUS, make_export
from service_process import Service
from transformers import AutoModelForSequenceClassification

from reward_actor import Group, RewardClient, RewardScorer
from reward_actor.model.manifest import write_manifest
from reward_actor.model.tokenizer import load_tokenizer
from trainer.init_model import init_model

if TYPE_CHECKING:
    from nursery import Nursery

pytestmark = pytest.mark.process

BODY = {
    "groups": [
        {"prompt_ids": [5] * 30, "completion_ids": [[n] * 20, [n]]} for n in range(6, 6 + 40)
    ]
}


@pytest.fixture(scope="module")
def registry(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two good models of one tokenizer, and one that renders otherwise."""
    root = tmp_path_factory.mktemp("registry")
    make_export(base_model, root / "a", seed=0)
    make_export(base_model, root / "b", seed=1, mean=0.5, std=2.0)
    make_export(base_model, root / "text" / "export", seed=2, format="text")
    return root


@pytest.fixture(scope="module")
def swapping(nursery: Nursery, registry: Path) -> Iterator[Service]:
    options = ["--num-replicas", "2", "--registry", str(registry)]
    with Service(nursery.python, registry / "a", *options) as service:
        yield service


@pytest.fixture(scope="module")
def expected(registry: Path) -> dict[str, list[float]]:
    """The offline rewards of the body under each version."""
    from reward_actor import Group

    groups = [Group(**group) for group in BODY["groups"]]
    found = {}
    for name in ("a", "b", "text/export"):
        scorer = RewardScorer.from_pretrained(registry / name, "cpu")
        scores = scorer.score(groups)
        found[scorer.model_version] = [r for score in scores for r in score.rewards]
    return found


def score(http: httpx.Client) -> tuple[str, list[float]]:
    reply = http.post("/v1/score", json=BODY)
    assert reply.status_code == 200, reply.text
    data = reply.json()
    return data["model_version"], [r for result in data["results"] for r in result["rewards"]]


def swap(http: httpx.Client, name: str) -> httpx.Response:
    return http.post("/v1/admin/models", json={"model": name})


def hammer(service: Service, expected: dict[str, list[float]], stop: threading.Event) -> set[str]:
    """Requests until told to stop; each reply must be one version's rewards. The versions seen."""
    versions = set()
    with httpx.Client(base_url=service.url, timeout=60) as http:
        while not stop.is_set():
            version, rewards = score(http)
            assert rewards == pytest.approx(expected[version], abs=1e-5)
            versions.add(version)
    return versions


def swap_under_load(
    service: Service, expected: dict[str, list[float]], names: list[str], pause_s: float = 0.0
) -> None:
    stop = threading.Event()
    with (
        ThreadPoolExecutor(4) as pool,
        httpx.Client(base_url=service.url, timeout=120) as http,
    ):
        clients = [pool.submit(hammer, service, expected, stop) for _ in range(4)]
        try:
            for name in names:
                done = swap(http, name)
                assert done.status_code == 200, done.text
                assert done.json()["num_replicas"] == 2
                assert score(http)[0] == done.json()["model_version"], "its own swap is seen"
                time.sleep(pause_s)
        finally:
            stop.set()
        seen = set().union(*(client.result() for client in clients))
    assert len(seen) >= 2


def test_swaps_under_load_cost_nothing_and_mix_nothing(
    swapping: Service, expected: dict[str, list[float]]
) -> None:
    swap_under_load(swapping, expected, ["b", "a", "text", "a"])


def test_what_can_be_swapped_in_is_listed(swapping: Service) -> None:
    with httpx.Client(base_url=swapping.url, timeout=60) as http:
        assert swap(http, "b").status_code == 200
        assert http.get("/v1/admin/models").json() == {
            "models": ["a", "b", "text"],
            "current": "b",
        }


def test_a_swap_changes_the_name(swapping: Service) -> None:
    with httpx.Client(base_url=swapping.url, timeout=60) as http:

        def scored(name: str) -> httpx.Response:
            return http.post("/v1/score", json={**BODY, "model": name})

        for name in ("b", "text", "b"):
            assert swap(http, name).json()["model"] == name
            assert http.get("/info").json()["model"] == name
            assert http.get("/v1/models").json()["data"][0]["id"] == name
            # Callers that name what the service was started with are not turned away.
            for given in (name, "a"):
                assert scored(given).json()["model"] == name
            assert http.get(f"/v2/models/{name}").json()["name"] == name
            assert scored("other").status_code == 404


def test_a_replica_that_starts_later_serves_what_was_swapped_in(
    swapping: Service, expected: dict[str, list[float]]
) -> None:
    with httpx.Client(base_url=swapping.url, timeout=60) as http:
        version = swap(http, "b").json()["model_version"]
        for pid in swapping.replica_pids():
            swapping.kill(pid)
        found, rewards = score(http)
        assert found == version
        assert rewards == pytest.approx(expected[version], abs=1e-5)
        assert http.get("/info").json()["model"] == "b"
        swapping.wait_for_replicas(2)


def _lost_file(model: Path) -> None:
    (model / "model.safetensors").unlink()


def _wrong_digest(model: Path) -> None:
    with (model / "model.safetensors").open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"\x01\x02\x03\x04")


def _not_finite(model: Path) -> None:
    from safetensors.numpy import load_file, save_file

    weights = load_file(model / "model.safetensors")
    weights["score.weight"][:] = float("nan")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    write_manifest(model)


def _two_heads(model: Path) -> None:
    from safetensors.numpy import load_file, save_file

    weights = load_file(model / "model.safetensors")
    weights["score.weight"] = weights["score.weight"].repeat(2, axis=0)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    config.update(num_labels=2, id2label={"0": "a", "1": "b"}, label2id={"a": 0, "b": 1})
    (model / "config.json").write_text(json.dumps(config))
    write_manifest(model)


def _golden_samples_fail(model: Path) -> None:
    contract = json.loads((model / "scoring_contract.json").read_text())
    contract["golden"]["raw_scores"]["float32"][0] += 0.1
    (model / "scoring_contract.json").write_text(json.dumps(contract))
    write_manifest(model)


BAD: dict[str, tuple[Any, str]] = {
    "lost-file": (_lost_file, "no .safetensors weights"),
    "wrong-digest": (_wrong_digest, "differs from its digest"),
    "not-finite": (_not_finite, "golden sample 0 scores nan"),
    "two-heads": (_two_heads, "the head has 2 outputs but the contract names 1"),
    "golden": (_golden_samples_fail, "golden sample 0 scores"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_model_is_refused_and_the_old_one_goes_on(
    swapping: Service, registry: Path, expected: dict[str, list[float]], name: str
) -> None:
    damage, reason = BAD[name]
    model = Path(shutil.copytree(registry / "a", registry / name))
    damage(model)
    try:
        with httpx.Client(base_url=swapping.url, timeout=60) as http:
            before = score(http)[0]
            refused = swap(http, name)
            assert refused.status_code == 409
            error = refused.json()["error"]
            assert error["type"] == "model_refused"
            assert reason in error["message"]
            assert str(registry) not in error["message"], "callers know names, not paths"
            version, rewards = score(http)
            assert version == before
            assert rewards == pytest.approx(expected[version], abs=1e-5)
            assert http.get("/info").json()["num_replicas"] == 2
    finally:
        shutil.rmtree(model)


def test_another_systems_model_is_served_to_its_own_end(
    swapping: Service, registry: Path, base_model: Path
) -> None:
    """Without a contract: up to the newline behind the turn, by every way to a reward."""
    model = Path(shutil.copytree(registry / "a", registry / "foreign"))
    for name in ("scoring_contract.json", "MANIFEST.json"):
        (model / name).unlink()
    tokenizer = load_tokenizer(model)
    turns = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    network = AutoModelForSequenceClassification.from_pretrained(model, dtype=torch.float32)
    with torch.inference_mode():
        expected = network(torch.tensor([ids])).logits.item()
    prompt = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    num_prompt = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    native = [
        {"prompt": turns[:1], "completions": ["Hello."]},
        {"texts": [text]},
        {"prompt_ids": ids[:num_prompt], "completion_ids": [ids[num_prompt:-1], ids[num_prompt:]]},
    ]
    try:
        with httpx.Client(base_url=swapping.url, timeout=60) as http:
            assert swap(http, "foreign").status_code == 200
            results = http.post("/v1/score", json={"groups": native}).json()["results"]
            found = [reward for result in results for reward in result["rewards"]]
            for body in ({"messages": turns}, {"input": text, "add_special_tokens": False}):
                reply = http.post("/classify", json={**body, "use_activation": False})
                found.append(reply.json()["data"][0]["probs"][0])
            assert found == pytest.approx([expected] * 6, abs=1e-5)
            rendering = http.get("/info").json()["rendering"]
            assert (rendering["turn_end"], rendering["end_text"]) == ("<|im_end|>", "\n")
            assert swap(http, "a").status_code == 200
    finally:
        shutil.rmtree(model)


def test_a_name_that_the_registry_has_not_is_not_found(swapping: Service) -> None:
    with httpx.Client(base_url=swapping.url, timeout=60) as http:
        for name in ("nope", "../a", "/etc", "http://127.0.0.1/a"):
            refused = swap(http, name)
            assert refused.status_code == 404
            assert refused.json()["error"]["type"] == "not_found"


def test_a_model_that_changed_under_its_name_is_loaded_anew(
    swapping: Service, registry: Path, base_model: Path
) -> None:
    with httpx.Client(base_url=swapping.url, timeout=60) as http:
        make_export(base_model, registry / "changing", seed=5)
        first = swap(http, "changing").json()["model_version"]
        make_export(base_model, registry / "changing", seed=6)
        second = swap(http, "changing").json()["model_version"]
        assert first != second
        assert score(http)[0] == second
        assert swap(http, "a").status_code == 200
    shutil.rmtree(registry / "changing")


@pytest.fixture
def large(registry: Path, tmp_path: Path) -> Iterator[Path]:
    """A model of the registry with 100 MB of weights."""
    base = init_model(
        tmp_path / "base", CORPUS, vocab_size=400, hidden_size=1024, num_layers=2, num_heads=8,
        num_kv_heads=8, head_dim=128, intermediate_size=2816, max_position_embeddings=256,
    )  # fmt: skip
    yield make_export(base, registry / "large", head_std=0.05)
    shutil.rmtree(registry / "large")


def private_bytes(service: Service) -> list[int]:
    return [psutil.Process(pid).memory_full_info().uss for pid in service.replica_pids()]


def error_of(reply: httpx.Response, status: int) -> dict[str, Any]:
    assert reply.status_code == status, reply.text
    error: dict[str, Any] = reply.json()["error"]
    return error


def test_asleep_the_replicas_give_their_memory_back_until_they_are_woken(
    swapping: Service, large: Path
) -> None:
    num_bytes = (large / "model.safetensors").stat().st_size
    assert num_bytes > 100e6
    body = {"groups": BODY["groups"][:1]}
    sleep, wake = "/v1/admin/sleep", "/v1/admin/wake"
    with (
        httpx.Client(base_url=swapping.url, timeout=120) as http,
        RewardClient(swapping.url) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        assert swap(http, "large").status_code == 200
        before = http.post("/v1/score", json=body).json()
        awake_bytes = private_bytes(swapping)
        for _ in range(2):
            reply = http.post(sleep).json()
            assert [state["asleep"] for state in reply["replicas"]] == [True, True]
            assert reply["asleep"]
        for awake, asleep in zip(awake_bytes, private_bytes(swapping), strict=True):
            assert awake - asleep > num_bytes
        refused = http.post("/v1/score", json=body)
        error = error_of(refused, 503)
        assert (error["type"], error["retryable"]) == ("asleep", True)
        assert "POST /v1/admin/wake" in error["message"]
        assert refused.headers["Retry-After"] == "1"
        ready = http.get("/ready")
        assert (ready.status_code, ready.json()["status"]) == (503, "asleep")
        assert http.get("/health").status_code == 200
        info = http.get("/info").json()
        assert (info["asleep"], info["num_replicas"], info["model"]) == (True, 2, "large")
        assert info["model_version"] == before["model_version"]
        error = error_of(swap(http, "a"), 409)
        assert (error["type"], "wake it first" in error["message"]) == ("model_refused", True)

        for pid in swapping.ingress_pids():
            swapping.kill(pid)
        known = client.info()
        assert (known.asleep, known.num_replicas, known.model) == (True, 2, "large")
        assert known.model_version == before["model_version"]

        for pid in swapping.replica_pids():
            swapping.kill(pid)
        swapping.wait_for_replicas(2)
        assert http.get("/info").json()["asleep"]
        assert max(private_bytes(swapping)) < min(awake_bytes) - num_bytes

        contract = large / "scoring_contract.json"
        good = contract.read_bytes()
        _golden_samples_fail(large)
        error = error_of(http.post(wake), 409)
        assert error["type"] == "model_refused"
        assert error["message"].count("golden sample 0 scores") == 2
        assert str(large) not in error["message"]
        assert http.get("/ready").json()["status"] == "asleep"
        contract.write_bytes(good)
        write_manifest(large)

        waiting = pool.submit(client.score_groups, [Group(**group) for group in body["groups"]])
        time.sleep(0.5)
        assert not waiting.done(), "it is tried again until the service is awake"
        for _ in range(2):
            reply = http.post(wake).json()
            assert [state["asleep"] for state in reply["replicas"]] == [False, False]
            assert not reply["asleep"]
        after = http.post("/v1/score", json=body).json()
        assert after["results"] == before["results"], "bit for bit"
        assert after["model_version"] == before["model_version"]
        assert waiting.result()[0].rewards == pytest.approx(before["results"][0]["rewards"])
        assert not http.get("/info").json()["asleep"]
        assert http.get("/ready").status_code == 200
        assert swap(http, "a").status_code == 200


@pytest.mark.long
def test_twenty_swaps_and_five_thousand_requests(
    swapping: Service, expected: dict[str, list[float]]
) -> None:
    num_requests = 0
    lock = threading.Lock()
    stop = threading.Event()

    def client() -> set[str]:
        nonlocal num_requests
        seen = set()
        with httpx.Client(base_url=swapping.url, timeout=60) as http:
            while not stop.is_set() or num_requests < 5000:
                version, rewards = score(http)
                assert rewards == pytest.approx(expected[version], abs=1e-5)
                seen.add(version)
                with lock:
                    num_requests += 1
        return seen

    with ThreadPoolExecutor(4) as pool, httpx.Client(base_url=swapping.url, timeout=120) as http:
        clients = [pool.submit(client) for _ in range(4)]
        for index in range(20):
            while num_requests < 250 * index and not any(c.done() for c in clients):
                time.sleep(0.01)
            done = swap(http, "ab"[(index + 1) % 2])
            assert done.status_code == 200, done.text
        stop.set()
        seen = set().union(*(each.result() for each in clients))
    assert num_requests >= 5000
    assert len(seen) == 2
    print(f"{num_requests} requests, 20 swaps, no error")
