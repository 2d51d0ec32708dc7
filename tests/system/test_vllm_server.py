"""vLLM's own server on the same export: the same bodies, the same answers.

Starting it takes half a minute.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from isolation import free_port
from offline import reward, templated

if TYPE_CHECKING:
    import httpx
    from nursery import Nursery

    from reward_actor import RewardScorer

_START_S = 300
CHAT = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]
LONG = "word " * 400
IDS = list(range(3, 303))


@pytest.fixture(scope="module")
def vllm(
    nursery: Nursery, vllm_engine: None, export_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[httpx.Client]:
    import httpx

    port = free_port()
    command = [nursery.python, "-m", "vllm.entrypoints.openai.api_server", "--runner", "pooling"]
    command += [
        "--model",
        str(export_dir),
        "--served-model-name",
        "reward-model",
        "--enforce-eager",
    ]
    command += ["--dtype", "float32", "--host", "127.0.0.1", "--port", str(port)]
    environment = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_NUM_THREADS": "2",
    }
    log = tmp_path_factory.mktemp("vllm") / "server.log"
    with log.open("wb") as output:
        server = subprocess.Popen(
            command, stdout=output, stderr=output, env=environment, start_new_session=True
        )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            deadline = time.monotonic() + _START_S
            while not _answers(client):
                assert server.poll() is None, log.read_text()[-3000:]
                assert time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(0.5)
            yield client
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def _answers(client: httpx.Client) -> bool:
    import httpx

    try:
        return client.get("/health").status_code == 200
    except httpx.TransportError:
        return False


def bodies(text: str) -> list[dict[str, Any]]:
    return [
        {"model": "reward-model", "input": text},
        {"model": "reward-model", "input": text, "use_activation": False},
        {"input": text, "activation": False, "add_special_tokens": False, "colour": 1},
        {"input": [text, "Hi.", text + " "]},
        {"input": [5, 6, 7]},
        {"input": [[5, 6, 7], [5]]},
        {"input": LONG, "truncate_prompt_tokens": 16},
        {"input": LONG, "truncate_prompt_tokens": -1},
        {"input": IDS, "truncate_prompt_tokens": 5, "truncation_side": "left"},
        {"input": IDS, "truncate_prompt_tokens": 5, "truncation_side": "right"},
        {"input": IDS, "truncate_prompt_tokens": 5},
        {"model": "other", "input": text},
        {"input": ""},
        {"input": []},
        {"input": LONG},
        {"input": text, "truncate_prompt_tokens": 0},
        {"input": text, "truncate_prompt_tokens": -2},
        {"input": [[5, 9999]]},
        {"input": {"a": 1}},
        {},
    ]


def test_the_same_bodies_get_the_same_answers(
    vllm: httpx.Client, http: httpx.Client, offline: RewardScorer
) -> None:
    text = templated(offline, "Hi.", "Hello.").rstrip("\n")
    statuses = set()
    for path, key in (("/classify", "probs"), ("/pooling", "data")):
        for body in bodies(text):
            theirs, ours = vllm.post(path, json=body), http.post(path, json=body)
            # What vLLM calls 400 is 422 here.
            status = 422 if theirs.status_code == 400 else theirs.status_code
            assert ours.status_code == status, body
            statuses.add(status)
            if status != 200:
                continue
            right, found = theirs.json(), ours.json()
            for row in right["data"]:
                row[key] = pytest.approx(row[key], abs=1e-4)
            assert found["data"] == right["data"], body
            assert found["usage"].items() <= right["usage"].items()
            assert set(found) == set(right)
            assert (found["object"], found["model"]) == (right["object"], right["model"])
    assert statuses == {200, 404, 422}


def test_a_conversation_is_read_at_the_end_of_its_turn_here_and_a_token_later_there(
    vllm: httpx.Client, http: httpx.Client, offline: RewardScorer
) -> None:
    """The difference that `serve.protocols.vllm` tells of."""
    text = templated(offline, "Hi.", "Hello.")
    assert text.endswith("<|im_end|>\n")
    late = offline.score_ids([offline.renderer.tokenizer(text)["input_ids"]]).tolist()
    right = [reward(offline, "Hi.", "Hello.")]
    for body in ({"messages": CHAT}, {"input": text}):
        [theirs] = vllm.post("/classify", json=body).json()["data"]
        [ours] = http.post("/classify", json=body).json()["data"]
        assert theirs["probs"] == pytest.approx(late, abs=1e-4)
        assert ours["probs"] == pytest.approx(right, abs=1e-5)
    assert abs(late[0] - right[0]) > 0.1
