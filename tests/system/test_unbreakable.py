"""What the service survives: killed replicas and ingresses, overload, callers that hang up. What it
does not, its head's and its command's end, leaves nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import psutil
import pytest
from processes import descendants
from service_process import Service

from reward_actor import Group, RewardClient, RewardScorer

if TYPE_CHECKING:
    from nursery import Nursery

pytestmark = [pytest.mark.process, pytest.mark.alone]

IDS = [(a, b) for a in range(5, 105) for b in range(5, 25)]
"""2,000 requests, each of one sequence that no other has."""


@pytest.fixture(scope="module")
def running(nursery: Nursery, export_dir: Path) -> Iterator[Service]:
    with Service(nursery.python, export_dir, "--num-replicas", "2") as service:
        yield service


MAX_QUEUE_S = 2.0


@pytest.fixture(scope="module")
def slow_service(nursery: Nursery, slow_export: Path) -> Iterator[Service]:
    options = ["--max-queue-s", str(MAX_QUEUE_S), "--name", "slow"]
    with Service(nursery.python, slow_export, *options) as service:
        yield service


@pytest.fixture(scope="module")
def expected(export_dir: Path) -> list[float]:
    scorer = RewardScorer.from_pretrained(export_dir, "cpu")
    rewards: list[float] = scorer.score_ids([[7, *ids] for ids in IDS]).tolist()
    return rewards


def post(http: httpx.Client, index: int) -> float:
    body = {"groups": [{"prompt_ids": [7], "completion_ids": [list(IDS[index])]}]}
    reply = http.post("/v1/score", json=body)
    assert reply.status_code == 200, reply.text
    [[reward]] = [result["rewards"] for result in reply.json()["results"]]
    return float(reward)


def ask(url: str, num_clients: int, num_requests: int, score: Callable[[Any, int], float],
        client: Callable[[str], Any], meanwhile: Callable[[Callable[[], int]], None]
) -> list[float]:  # fmt: skip
    """The rewards of requests 0 to n - 1, asked for once each by several clients. `meanwhile` runs
    beside them, and is told how many are answered."""
    answers: dict[int, float] = {}
    indices = iter(range(num_requests))
    lock = threading.Lock()

    def one_client() -> None:
        with client(url) as http:
            while True:
                with lock:
                    index = next(indices, None)
                if index is None:
                    return
                reward = score(http, index)
                assert index not in answers
                answers[index] = reward

    with ThreadPoolExecutor(num_clients) as pool:
        clients = [pool.submit(one_client) for _ in range(num_clients)]
        meanwhile(lambda: num_requests if any(c.done() for c in clients) else len(answers))
        for each in clients:
            each.result()
    return [answers[index] for index in range(num_requests)]


def plain_http(url: str) -> httpx.Client:
    return httpx.Client(base_url=url, timeout=120)


def kill_each(
    service: Service, pids: Callable[[], list[int]], num_kills: int, num_requests: int
) -> Callable[[Callable[[], int]], None]:
    """Kill that many processes, evenly spread over the requests."""

    def run(num_answered: Callable[[], int]) -> None:
        for kill in range(num_kills):
            while num_answered() < (kill + 0.5) * num_requests / num_kills:
                time.sleep(0.005)
            while not (alive := pids()):
                time.sleep(0.05)
            service.kill(alive[kill % len(alive)])

    return run


def test_a_killed_replica_costs_nobody_anything(running: Service, expected: list[float]) -> None:
    """Clients without retries of their own."""
    killing = kill_each(running, running.replica_pids, 1, 300)
    assert ask(running.url, 8, 300, post, plain_http, killing) == pytest.approx(
        expected[:300], abs=1e-5
    )
    running.wait_for_replicas(2)


def client_post(client: RewardClient, index: int) -> float:
    group = Group(prompt_ids=[7], completion_ids=[list(IDS[index])])
    [reward] = client.score_groups([group])[0].rewards
    assert reward is not None
    return reward


def test_a_killed_ingress_costs_clients_that_retry_nothing(
    running: Service, expected: list[float]
) -> None:
    killing = kill_each(running, running.ingress_pids, 1, 300)
    rewards = ask(running.url, 8, 300, client_post, RewardClient, killing)
    assert rewards == pytest.approx(expected[:300], abs=1e-5)


def test_an_ingress_refuses_what_is_meant_for_another_service(running: Service) -> None:
    """HAProxy goes on to send to the port of an ingress that died, whoever holds it now."""
    [ingress] = running.processes("ray::ServeReplica:rayward:Ingress")
    ports = [c.laddr.port for c in ingress.net_connections("tcp") if c.status == "LISTEN"]
    [raylet] = [process for process in running.processes("") if process.name() == "raylet"]
    name = raylet.environ()["RAYWARD_SERVICE"]  # its workers inherit it
    answers = set()
    for port in ports:
        with contextlib.suppress(httpx.HTTPError), plain_http(f"http://127.0.0.1:{port}") as http:
            own = http.get("/health", headers={"X-Rayward-Service": name})
            other = http.get("/health", headers={"X-Rayward-Service": "another"})
            answers.add((own.status_code, other.status_code))
    assert (200, 503) in answers


def test_callers_that_hang_up_take_their_work_with_them(running: Service) -> None:
    """Each leaves work of about a second behind; the next caller must not wait for it."""
    running.wait_for_replicas(2)
    num_callers = 500

    async def hang_up() -> None:
        ids = list(range(5, 205))
        body = httpx.Request("POST", f"{running.url}/v1/score", json={
            "groups": [{"prompt_ids": [n], "completion_ids": [ids[i:] for i in range(40)]}
                       for n in range(5, 15)]
        }).content  # fmt: skip
        head = (
            f"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        ).encode()

        async def one() -> None:
            _, writer = await asyncio.open_connection("127.0.0.1", running.port)
            writer.write(head + body)
            await writer.drain()
            await asyncio.sleep(0.05)
            writer.close()

        for _ in range(num_callers // 50):
            await asyncio.gather(*(one() for _ in range(50)))

    with plain_http(running.url) as http:
        post(http, 0)
        before = running.num_file_descriptors()
        asyncio.run(hang_up())
        started = time.monotonic()
        post(http, 1)
        assert time.monotonic() - started < 10.0, "80,000 s of work by 500 callers is gone"
        deadline = time.monotonic() + 20
        while running.num_file_descriptors() > before + 20:
            assert time.monotonic() < deadline, "connections of callers who have gone stay open"
            time.sleep(0.2)


def test_callers_that_hang_up_end_no_work_of_others(
    slow_service: Service, slow_export: Path
) -> None:
    """Ray Serve ends whatever a request has begun; a message may hold parts of other requests."""
    done = threading.Event()
    completion = list(range(5, 105))

    def ask(prompts: list[list[int]], timeout_s: float) -> list[float] | None:
        """The rewards, or None when the queue was full."""
        groups = [{"prompt_ids": prompt, "completion_ids": [completion]} for prompt in prompts]
        with httpx.Client(base_url=slow_service.url, timeout=timeout_s) as http:
            reply = http.post("/v1/score", json={"groups": groups})
        if reply.status_code == 429:
            return None
        results = reply.raise_for_status().json()["results"]
        return [reward for result in results for reward in result["rewards"]]

    def hang_up(seed: int) -> None:
        random = np.random.default_rng(seed)
        while not done.is_set():
            prompts = random.integers(5, 300, (36, 100)).tolist()  # several messages
            with contextlib.suppress(httpx.TimeoutException):
                ask(prompts, random.uniform(0.1, 2.0))

    def wait(prompts: list[list[int]]) -> list[float]:
        while (rewards := ask(prompts, 30)) is None:
            time.sleep(0.1)
        return rewards

    asked = np.random.default_rng(100).integers(5, 300, (12, 3, 100)).tolist()
    with ThreadPoolExecutor(8) as pool:
        rude = [pool.submit(hang_up, seed) for seed in range(4)]
        try:
            found = list(pool.map(wait, asked))
        finally:
            done.set()
        for each in rude:
            each.result()
    offline = RewardScorer.from_pretrained(slow_export, "cpu")
    for prompts, rewards in zip(asked, found, strict=True):
        expected = offline.score_ids([[*prompt, *completion] for prompt in prompts])
        assert rewards == pytest.approx(expected, abs=1e-5)


def overload(service: Service, seconds: float, factor: float) -> dict[str, Any]:
    """Open loop load of `factor` times what the service can do. What came back, and how late."""
    # Every request's prompts are its own: what is asked for twice is computed once.
    random = np.random.default_rng(0)
    num_tokens = 5 * 300

    def body() -> dict[str, Any]:
        prompts = random.integers(5, 300, (5, 100)).tolist()
        completions = random.integers(5, 300, (8, 25)).tolist()
        return {"groups": [{"prompt_ids": p, "completion_ids": completions} for p in prompts]}

    async def run() -> dict[str, Any]:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=200)
        async with httpx.AsyncClient(
            base_url=service.url, timeout=120, limits=limits
        ) as http:  # fmt: skip
            for _ in range(6):  # the rate is known afterwards
                started = time.monotonic()
                (await http.post("/v1/score", json=body())).raise_for_status()
                capacity = 1.0 / (time.monotonic() - started)
            statuses: Counter[int] = Counter()
            latencies: list[float] = []
            missing_header = 0

            async def one() -> None:
                nonlocal missing_header
                began = time.monotonic()
                reply = await http.post("/v1/score", json=body())
                statuses[reply.status_code] += 1
                if reply.status_code == 200:
                    latencies.append(time.monotonic() - began)
                elif int(reply.headers.get("Retry-After", 0)) < 1:
                    missing_header += 1

            memory = service.memory_bytes()
            tasks = []
            start = time.monotonic()
            for index in itertools.count():
                due = start + index / (factor * capacity)
                if due > start + seconds:
                    break
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                tasks.append(asyncio.create_task(one()))
            memory_during = service.memory_bytes()
            await asyncio.gather(*tasks)
            ended = time.monotonic()
            (await http.post("/v1/score", json=body())).raise_for_status()
            return {
                "capacity_tokens_per_s": capacity * num_tokens,
                "statuses": dict(statuses),
                "latencies": sorted(latencies),
                "missing_header": missing_header,
                "grown_bytes": memory_during - memory,
                "recovery_s": time.monotonic() - ended,
            }

    return asyncio.run(run())


def check_overload(found: dict[str, Any]) -> None:
    assert set(found["statuses"]) == {200, 429}
    assert found["statuses"][429] > found["statuses"][200]
    assert found["missing_header"] == 0
    # What is accepted waits at most max_queue_s by the measured rate; the machine is shared.
    assert found["latencies"][-1] < 5 * MAX_QUEUE_S
    assert found["recovery_s"] < 2.0
    assert found["grown_bytes"] < 200 * 2**20


def test_overload_is_answered_with_429_in_good_time(slow_service: Service) -> None:
    check_overload(overload(slow_service, 6.0, 10.0))


@pytest.mark.long
def test_overload_for_a_minute(slow_service: Service) -> None:
    found = overload(slow_service, 60.0, 10.0)
    latencies = found.pop("latencies")
    print(found, "latency p50", latencies[len(latencies) // 2], "max", latencies[-1])
    check_overload({**found, "latencies": latencies})


@pytest.mark.long
def test_two_thousand_requests_and_five_killed_replicas(
    running: Service, expected: list[float]
) -> None:
    killing = kill_each(running, running.replica_pids, 5, 2000)
    rewards = ask(running.url, 8, 2000, post, plain_http, killing)
    assert rewards == pytest.approx(expected, abs=1e-5)
    running.wait_for_replicas(2)


@pytest.mark.long
def test_two_thousand_requests_and_a_killed_ingress(
    running: Service, expected: list[float]
) -> None:
    killing = kill_each(running, running.ingress_pids, 1, 2000)
    rewards = ask(running.url, 8, 2000, client_post, RewardClient, killing)
    assert rewards == pytest.approx(expected, abs=1e-5)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_soak_at_half_load_for_twenty_minutes(slow_service: Service) -> None:
    """Memory and file descriptors after the first minutes and at the end; every answer right."""
    random = np.random.default_rng(0)

    def new() -> dict[str, Any]:  # what was scored before would not be computed again
        prompts = random.integers(5, 300, (5, 100)).tolist()
        completions = random.integers(5, 300, (8, 25)).tolist()
        return {"groups": [{"prompt_ids": p, "completion_ids": completions} for p in prompts]}

    def rewards_of(reply: httpx.Response) -> list[float]:
        return [reward for result in reply.json()["results"] for reward in result["rewards"]]

    known = new()
    with plain_http(slow_service.url) as http:
        first = rewards_of(http.post("/v1/score", json=known))
        began = time.monotonic()
        measured: list[tuple[float, int, int]] = []
        for num_requests in itertools.count(1):
            started = time.monotonic()
            if started > began + 1200:
                break
            is_known = num_requests % 10 == 0
            reply = http.post("/v1/score", json=known if is_known else new())
            assert reply.status_code == 200, reply.text
            if is_known:
                assert rewards_of(reply) == pytest.approx(first, abs=1e-5)
            now = time.monotonic()
            if not measured or now > measured[-1][0] + 60:
                used = slow_service.memory_bytes(), slow_service.num_file_descriptors()
                measured.append((now, *used))
            time.sleep(now - started)  # as long again: half load
    memory = [m / 2**20 for _, m, _ in measured]
    print(f"{num_requests} requests; MiB by minute {[round(m) for m in memory]}")
    print(f"file descriptors {[n for _, _, n in measured]}")
    assert memory[-1] < memory[4] * 1.05
    assert measured[-1][2] <= measured[4][2] + 10


# The last ones: they end the services of this file.


def all_processes(service: Service) -> list[psutil.Process]:
    return list(descendants(psutil.Process(service.process.pid)))


def haproxy_folder(processes: list[psutil.Process]) -> Path:
    """Of its settings, its socket and a link to the key."""
    [haproxy] = [process for process in processes if process.name() == "haproxy"]
    folder = Path(haproxy.environ()["RAY_SERVE_HAPROXY_SERVER_STATE_BASE"])
    assert folder.exists()
    return folder


def assert_nothing_is_left(service: Service, processes: list[psutil.Process], folder: Path) -> None:
    """Within seconds, and until then no answer blames the caller or says `internal`."""
    deadline = time.monotonic() + 30
    with httpx.Client(base_url=service.url, timeout=2) as http:
        while True:
            assert time.monotonic() < deadline, "something listens at its port yet"
            try:
                assert http.get("/ready").status_code in (200, 503)
            except httpx.ConnectError:
                break
            except httpx.TransportError:
                continue  # it was cut off
    _, alive = psutil.wait_procs(processes, timeout=20)
    assert [each for each in alive if each.status() != psutil.STATUS_ZOMBIE] == []
    while folder.exists():
        assert time.monotonic() < deadline, "HAProxy's files are there yet"
        time.sleep(0.05)


def test_nothing_is_left_of_a_service_whose_head_is_killed(running: Service) -> None:
    processes = all_processes(running)
    folder = haproxy_folder(processes)
    [head] = [process for process in processes if process.name() == "gcs_server"]
    head.kill()
    assert_nothing_is_left(running, processes, folder)
    assert running.process.wait(20) == 1
    assert running.process.stdout is not None
    assert "error: Ray's gcs_server has ended" in running.process.stdout.read()


def test_nothing_is_left_of_a_service_whose_command_is_killed(slow_service: Service) -> None:
    processes = all_processes(slow_service)
    folder = haproxy_folder(processes)
    slow_service.process.kill()
    assert_nothing_is_left(slow_service, processes, folder)
