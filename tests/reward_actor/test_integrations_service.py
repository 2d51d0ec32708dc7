"""Each trainer's way of asking the service for rewards, by the calls that it makes itself."""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from samples import USER

from reward_actor import (
    AsyncRewardClient,
    Group,
    RewardClient,
    RewardHandle,
    RewardScorer,
    RewardServiceError,
)
from reward_actor.integrations import openrlhf, scorers
from reward_actor.integrations.nemo_rl import RewardEnvironment
from reward_actor.integrations.skyrl import RewardStep
from reward_actor.integrations.trl import reward_function
from reward_actor.integrations.verl import compute_score, compute_score_async

TOO_LONG = "word " * 500


@pytest.fixture
def url(service: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The service's address, in the environment as well."""
    monkeypatch.setenv(scorers.URL_VARIABLE, service)
    return service


def rewards(offline: RewardScorer, prompt: Any, *completions: str) -> list[float | None]:
    return offline.score([Group(prompt, completions)])[0].rewards


# ---- TRL

TRL_COLUMNS = {
    "completion_ids": [[1], [2], [3], [4]],
    "label": ["a", "a", "b", "b"],
    "trainer_state": object(),
    "log_extra": print,
    "log_metric": print,
}


@pytest.mark.parametrize("kind", ["text", "conversation"])
def test_trl_text_and_conversations_sync_and_async(
    url: str, offline: RewardScorer, kind: str
) -> None:
    prompts: list[Any] = ["Hi.", "Hi.", "Name two fruits.", "Name two fruits."]
    texts: list[Any] = ["Hello!", "What?", TOO_LONG, "An apple and a pear."]
    expected = [
        *rewards(offline, "Hi.", "Hello!", "What?"),
        None,
        *rewards(offline, "Name two fruits.", "An apple and a pear."),
    ]
    if kind == "conversation":
        prompts = [[{"role": "user", "content": prompt}] for prompt in prompts]
        texts = [[{"role": "assistant", "content": text}] for text in texts]

    async def awaited(function: Any) -> Any:
        return await function(prompts=prompts, completions=texts, **TRL_COLUMNS)

    for scorer in (url, RewardClient(url), RewardHandle()):
        function: Any = reward_function(scorer, name="our-reward")
        assert not inspect.iscoroutinefunction(function)
        assert function.__name__ == "our-reward"
        got = function(prompts=prompts, completions=texts, **TRL_COLUMNS)
        assert got == pytest.approx(expected, abs=1e-5)
    for function in (
        reward_function(url, asynchronous=True),
        reward_function(AsyncRewardClient(url)),
    ):
        assert inspect.iscoroutinefunction(function)
        assert asyncio.run(awaited(function)) == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ValueError, match="asynchronous needs"):
        reward_function(RewardClient(url), asynchronous=True)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_trl_trains_a_policy_on_the_service(
    url: str, base_model: Path, tmp_path: Path, asynchronous: bool
) -> None:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    seen: list[tuple[int, list[float | None]]] = []
    ours: Any = reward_function(url, asynchronous=asynchronous)
    watching: Any
    if asynchronous:

        async def watching(prompts: Any, completions: Any, **columns: Any) -> Any:
            seen.append((len(prompts), await ours(prompts, completions, **columns)))
            return seen[-1][1]
    else:

        def watching(prompts: Any, completions: Any, **columns: Any) -> Any:
            seen.append((len(prompts), ours(prompts, completions, **columns)))
            return seen[-1][1]

    prompts = [[{"role": "user", "content": text}] for text in ("Name two fruits.", "Hi.")]
    for _ in range(2 if asynchronous else 1):  # each trainer has a loop, and keeps it
        seen.clear()
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(base_model),
            processing_class=AutoTokenizer.from_pretrained(base_model),
            reward_funcs=[ours, watching],
            train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
            args=GRPOConfig(
                output_dir=str(tmp_path),
                max_steps=2,
                per_device_train_batch_size=4,
                num_generations=4,
                max_completion_length=8,
                use_cpu=True,
                report_to=[],
                save_strategy="no",
                logging_steps=1,
                disable_tqdm=True,
            ),
        )
        trainer.train()
        logged = [row for row in trainer.state.log_history if "rewards/rayward/mean" in row]
        assert len(logged) == len(seen) == 2
        for row, (num, got) in zip(logged, seen, strict=True):
            assert num == 4
            assert row["rewards/rayward/mean"] == pytest.approx(sum(got) / num, abs=1e-4)


# ---- OpenRLHF


def load_as_openrlhf_does() -> Any:
    """openrlhf/utils/agent.py, SingleTurnAgentExecutor.__init__"""
    spec = importlib.util.spec_from_file_location("reward_func", openrlhf.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.reward_func


def test_openrlhf_scores_templated_texts_as_they_are(
    url: str, offline: RewardScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = offline.renderer.tokenizer
    ids = [offline.renderer.render("Hi.", text) for text in ("Hello!", "What?", TOO_LONG)]
    queries = [tokenizer.decode(each, skip_special_tokens=False) for each in ids]
    prompts = [tokenizer.decode(offline.renderer.prompt_ids("Hi."))] * 3
    assert queries[0].startswith(prompts[0])
    reward_func = load_as_openrlhf_does()

    async def as_openrlhf_does() -> list[dict[str, Any]]:
        """One call for each sample, in threads."""
        calls = [
            asyncio.to_thread(reward_func, [query], [prompt], ["label"])
            for query, prompt in zip(queries[:2] * 8, prompts[:2] * 8, strict=True)
        ]
        return await asyncio.gather(*calls)

    expected = rewards(offline, "Hi.", "Hello!", "What?") * 8
    for info, reward in zip(asyncio.run(as_openrlhf_does()), expected, strict=True):
        assert info["rewards"].tolist() == pytest.approx([reward], abs=1e-5)
        assert info["scores"].tolist() == info["rewards"].tolist()
        # openrlhf/trainer/ppo_utils/samples_generator.py takes one number of each
        assert all(value.flatten()[0].item() >= 0 for value in info["extra_logs"].values())
    with pytest.raises(RewardServiceError, match="too_long"):
        reward_func(queries, prompts, [None] * 3)
    monkeypatch.setenv(openrlhf.ERROR_REWARD_VARIABLE, "-5")
    info = reward_func(queries, prompts, [None] * 3)
    assert info["rewards"].tolist() == pytest.approx([*expected[:2], -5.0], abs=1e-5)
    assert info["extra_logs"]["without_reward"].tolist() == [0, 0, 1]


# ---- verl


def test_verl_calls_with_the_prompt_in_extra_info(url: str, offline: RewardScorer) -> None:
    [expected] = rewards(offline, "Name two fruits.", "An apple and a pear.")
    call = {
        "data_source": "fruits",
        "solution_str": "An apple and a pear.",
        "ground_truth": "none",
        "extra_info": {
            "prompt": USER,
            "question": "Name two fruits.",
            "num_turns": 2,
            "rollout_reward_scores": {},
        },
        "reward_router_address": None,
    }
    with ThreadPoolExecutor(8) as threads:  # as NaiveRewardManager does
        futures = [threads.submit(compute_score, **call) for _ in range(16)]
        assert {round(future.result()["score"], 4) for future in futures} == {round(expected, 4)}
    assert compute_score(**call, prompt_key="question")["score"] == pytest.approx(
        expected, abs=1e-5
    )

    async def awaited() -> list[dict[str, float]]:
        return await asyncio.gather(*(compute_score_async(**call) for _ in range(16)))

    assert inspect.iscoroutinefunction(compute_score_async)
    for result in asyncio.run(awaited()):
        assert result["score"] == pytest.approx(expected, abs=1e-5)
        assert result["num_tokens"] > 0
    with pytest.raises(ValueError, match="prompt_key"):
        compute_score(**{**call, "extra_info": {"index": 3}})
    too_long = {**call, "solution_str": TOO_LONG}
    with pytest.raises(RewardServiceError, match="too_long"):
        compute_score(**too_long)
    assert compute_score(**too_long, error_reward=-1.0)["score"] == -1.0


# ---- SkyRL


class TextEnv:
    """What SkyRL's BaseTextEnv gives its children."""

    def __init__(self) -> None:
        self.turns = 0
        self.max_turns = 1

    def close(self) -> None:
        pass


class RewardEnv(RewardStep, TextEnv):
    pass


def test_skyrl_steps_once(url: str, offline: RewardScorer) -> None:
    [expected] = rewards(offline, USER, "An apple and a pear.")
    env = RewardEnv(env_config={}, extras={"max_turns": 1, "reward_spec": {}})
    prompt, metadata = env.init([dict(message) for message in USER])
    assert (prompt, metadata) == (USER, {})
    output = env.step("An apple and a pear.")
    assert output["reward"] == pytest.approx(expected, abs=1e-5)
    assert output["observations"] == []
    assert output["done"] is True
    assert output["metadata"] == {"model_version": offline.model_version}
    assert env.get_metrics()["reward_model_tokens"] > 0
    env.close()

    class Config:
        error_reward = "-2"

    lenient = RewardEnv(env_config=Config(), extras={"url": url})
    lenient.init(USER)
    assert lenient.step(TOO_LONG)["reward"] == -2.0
    with pytest.raises(RewardServiceError, match="too_long"):
        env.step(TOO_LONG)


# ---- NeMo-RL


def test_nemo_rl_steps_in_batches(url: str, offline: RewardScorer) -> None:
    import torch

    texts = ["Hello!", "What?", "An apple and a pear."]
    prompts = ["Hi.", "Hi.", "Name two fruits."]
    logs = [
        [
            {"role": "user", "content": f"<templated>{prompt}</templated>"},
            {"role": "assistant", "content": text},
        ]
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    env = RewardEnvironment({"url": url, "prompt_key": "problem"})
    infos = [{"problem": prompt} for prompt in prompts]
    # nemo_rl/experience/rollouts.py unpacks six
    observations, metadata, stop_strings, got, terminateds, answers = env.step(logs, infos)
    expected = rewards(offline, "Hi.", *texts[:2]) + rewards(offline, prompts[2], texts[2])
    assert got.tolist() == pytest.approx(expected, abs=1e-5)
    assert (got.dtype, terminateds.dtype, terminateds.all()) == (torch.float32, torch.bool, True)
    assert [set(each) for each in observations] == [{"role", "content"}] * 3
    assert (metadata, stop_strings, answers) == ([None] * 3, [None] * 3, texts)
    _, metrics = env.global_post_process_and_metrics({"rewards": got})
    assert metrics["rayward/max_reward"] == pytest.approx(max(expected), abs=1e-5)
    env.shutdown()

    by_log = RewardEnvironment({"url": url, "error_reward": -3.0})
    raw = [[{"role": "user", "content": "Hi."}, {"role": "assistant", "content": TOO_LONG}]]
    raw += [[*USER, {"role": "assistant", "content": texts[2]}]]
    assert by_log.step(raw, [None, None]).rewards.tolist() == pytest.approx(
        [-3.0, expected[2]], abs=1e-5
    )
    with pytest.raises(ValueError, match="prompt_key names"):
        env.step(logs, [None] * 3)
