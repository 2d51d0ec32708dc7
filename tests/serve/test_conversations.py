"""A conversation with tools, a call, its result and reasoning has one reward, by every way in."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from conversations import ANSWER, ARGS, ASKED, CALLING, ROW, TEMPLATE, TOOLS
from exports import make_export
from transformers import AutoTokenizer

from rayward import main
from reward_actor import AsyncRewardHandle, Group, RewardClient, RewardHandle, RewardScorer
from reward_actor.files import group_of
from reward_actor.integrations.trl import reward_function
from trainer.config.data import Columns
from trainer.data.parse import parse_row
from trainer.evaluation.evaluate import evaluate_model

PAIR = {"prompt": ASKED, "chosen": ANSWER, "rejected": "No.", "tools": TOOLS,
        "chat_template_kwargs": ARGS}  # fmt: skip


@pytest.fixture(scope="module")
def export(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tools")
    shutil.copytree(base_model, root / "base")
    tokenizer = AutoTokenizer.from_pretrained(root / "base")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(root / "base")
    return make_export(root / "base", root / "tools", seed=5, mean=0.5, std=2.0)


@pytest.fixture(scope="module")
def scorer(export: Path) -> RewardScorer:
    return RewardScorer.from_pretrained(export, "cpu")


@pytest.fixture(scope="module")
def ids(scorer: RewardScorer) -> list[list[int]]:
    """What training renders of a pair."""
    row = parse_row(1, PAIR, Columns())
    found = [
        scorer.renderer.render(
            side.prompt, side.completion, tools=row.tools, template_args=row.template_args
        )
        for side in row.sides
    ]
    for sequence in found:
        text = scorer.renderer.tokenizer.decode(sequence)
        assert all(part in text for part in ('"name": "weather"', "I look.", "3 mm", "(brief) "))
    return found


@pytest.fixture(scope="module")
def of_sides(scorer: RewardScorer, ids: list[list[int]]) -> list[float]:
    return [float(reward) for reward in scorer.score_ids(ids)]


@pytest.fixture(scope="module")
def trained(of_sides: list[float]) -> float:
    return of_sides[0]


@pytest.fixture(scope="module")
def url(service: str, export: Path) -> Iterator[str]:
    """A second application in the cluster of the shared one."""
    from ray import serve

    from serve.app import build, resolve
    from serve.config import ServeConfig

    config = ServeConfig(
        model=str(export), device="cpu", cpus_per_replica=0.5, threads_per_replica=1
    )
    serve.run(build(resolve(config), use_gpu=False), name="tools", route_prefix="/tools")
    yield service + "/tools"
    serve.delete("tools")


def test_clients_and_handles(url: str, ids: list[list[int]], trained: float) -> None:
    group = Group(ASKED, [ANSWER], tools=TOOLS, template_args=ARGS)
    with RewardClient(url) as client:
        [as_json] = client.score_groups([group])
        [as_binary] = client.score_groups(
            [Group(prompt_ids=ids[0][:9], completion_ids=[ids[0][9:]])]
        )
    [over_ray] = RewardHandle("tools").score_groups([group])
    assert as_json.errors == as_binary.errors == over_ray.errors == [None]
    assert as_json.rewards == over_ray.rewards == [pytest.approx(trained, abs=1e-5)]
    assert as_binary.rewards == as_json.rewards


def test_an_asynchronous_handle(url: str, trained: float) -> None:
    group = group_of(ROW, "in:1")

    async def score() -> list[float | None]:
        [scores] = await AsyncRewardHandle("tools").score_groups([group])
        return scores.rewards

    assert asyncio.run(score()) == [pytest.approx(trained, abs=1e-5)]


def test_a_turn_that_thinks_and_calls(url: str, scorer: RewardScorer) -> None:
    ids = scorer.renderer.render(ASKED[:1], CALLING, tools=TOOLS)
    assert "I look." in scorer.renderer.tokenizer.decode(ids)
    [expected] = scorer.score_ids([ids]).tolist()
    bodies = {
        "/v1/score": {"groups": [{"prompt": ASKED[:1], "completions": [CALLING], "tools": TOOLS}]},
        "/classify": {"messages": [ASKED[0], CALLING], "tools": TOOLS},
    }
    for path, body in bodies.items():
        reply = httpx.post(url + path, json=body, timeout=60)
        assert reply.status_code == 200, reply.text
        found = reply.json()
        reward = found["data"][0]["probs"] if "data" in found else found["results"][0]["rewards"]
        assert reward == [pytest.approx(expected, abs=1e-5)]
    score = reward_function(url)
    rewards = score([ASKED[:1]], [[CALLING]], tools=[TOOLS])
    assert rewards == [pytest.approx(expected, abs=1e-5)]


def test_vllms_route(url: str, trained: float) -> None:
    said = [{"role": "assistant", "content": ANSWER}]
    body = {"messages": [*ASKED, *said], "tools": TOOLS, "chat_template_kwargs": ARGS}
    reply = httpx.post(f"{url}/classify", json=body, timeout=60)
    assert reply.status_code == 200, reply.text
    assert reply.json()["data"][0]["probs"] == [pytest.approx(trained, abs=1e-5)]


def test_trls_adapter(url: str, trained: float) -> None:
    score = reward_function(url)
    rewards = score([ASKED], [ANSWER], tools=[TOOLS], chat_template_kwargs=[ARGS])
    assert rewards == [pytest.approx(trained, abs=1e-5)]


@pytest.mark.parametrize("where", ["service", "directory"])
def test_files(url: str, export: Path, of_sides: list[float], tmp_path: Path, where: str) -> None:
    trained, other = of_sides
    rows, scored = tmp_path / "rows.jsonl", tmp_path / "scored.jsonl"
    rows.write_text(json.dumps(ROW) + "\n")
    assert main(["score", url if where == "service" else str(export), str(rows), str(scored)]) == 0
    [row] = map(json.loads, scored.read_text().splitlines())
    assert row["rewards"] == [pytest.approx(trained, abs=1e-5)]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps(PAIR) + "\n")
    result = evaluate_model(url if where == "service" else str(export), str(pairs))
    assert result["num_pairs"] == 1
    assert result["reward_margin"] == pytest.approx(trained - other, abs=1e-5)
    assert result["raw_margin"] == pytest.approx(2 * (trained - other), abs=2e-5)


def test_what_is_wrong_is_named(url: str) -> None:
    prompt = [*ASKED, {"role": "user", "content": [{"type": "image_url"}]}]
    body = {"groups": [{"prompt": prompt, "completions": [ANSWER]}]}
    reply = httpx.post(f"{url}/v1/score", json=body, timeout=60)
    assert reply.status_code == 422
    message = reply.json()["error"]["message"]
    assert "groups.0.prompt.3.content" in message
    assert "is of type 'image_url'; a reward model reads text" in message
