"""Asks a service for rewards by a trainer's own code: `python clients.py TRAINER < task.json`.

It runs in the environment of `make test-integrations`. Its last line is {way: rewards}, of each way
that the trainer has. A task has the service's `url`, the directory `model` of what it serves (its
tokenizer is also the policy's), the trees of `sources`, the page's `file` of the user's code, and
`samples` of {"prompt", "completion"}; `long`, where it is asked for, is one that has no reward.
"""

from __future__ import annotations

import asyncio
import json
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

Task = dict[str, Any]
Rewards = dict[str, list[Any]]

REFUSED = "refused"


def bare(*packages: str) -> None:
    """Packages, parents first, whose `__init__` must not run, since it wants what needs a GPU."""
    for name in packages:
        spec = find_spec(name)
        assert spec is not None
        module = ModuleType(name)
        module.__path__ = list(spec.submodule_search_locations or ())
        sys.modules[name] = module


def tokenizer_of(task: Task) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(task["model"])


def user(sample: Task) -> list[dict[str, str]]:
    return [{"role": "user", "content": sample["prompt"]}]


def conversation(sample: Task) -> list[dict[str, str]]:
    return [*user(sample), {"role": "assistant", "content": sample["completion"]}]


def openrlhf(task: Task) -> Rewards:
    """The executor of its vLLM engines, with an engine that samples what the task says."""
    from openrlhf.utils.agent import SingleTurnAgentExecutor

    from reward_actor.integrations import openrlhf as functions

    tokenizer = tokenizer_of(task)

    async def reward(executor: Any, sample: Task) -> float:
        class Engine:
            async def generate(self, *_: Any, **__: Any) -> Any:
                ids = [*tokenizer(sample["completion"])["input_ids"], tokenizer.eos_token_id]
                output = SimpleNamespace(token_ids=ids, finish_reason="stop", logprobs=None)
                return SimpleNamespace(outputs=[output])

        prompt = tokenizer.apply_chat_template(
            user(sample), tokenize=False, add_generation_prompt=True
        )
        sampling = SimpleNamespace(max_tokens=64, logprobs=None)
        found = await executor.execute(prompt, None, sampling, 2048, tokenizer, Engine())
        return float(found["reward"][0])

    async def rewards(endpoint: str) -> list[float]:
        executor = SingleTurnAgentExecutor([endpoint])
        return await asyncio.gather(*(reward(executor, sample) for sample in task["samples"]))

    return {
        "function file": asyncio.run(rewards(functions.__file__)),
        "HTTP": asyncio.run(rewards(task["url"] + "/get_reward")),
    }


def verl(task: Task) -> Rewards:
    """Its reward loop's worker, with the options of our example and with a reward model's."""
    import numpy as np
    import torch
    import verl as package
    from hydra import compose, initialize_config_dir
    from verl import DataProto
    from verl.experimental.reward_loop.reward_loop import RewardLoopWorker

    tokenizer = tokenizer_of(task)
    address = task["url"].removeprefix("http://")

    def batch(sample: Task) -> DataProto:
        ids = [*tokenizer(sample["completion"])["input_ids"], tokenizer.eos_token_id]
        prompt = tokenizer.apply_chat_template(
            user(sample), add_generation_prompt=True, return_dict=False
        )
        column = {
            "data_source": "ours",
            "reward_model": {"ground_truth": ""},
            "extra_info": {"prompt": user(sample), "question": sample["prompt"]},
            "raw_prompt": user(sample),
        }
        return DataProto.from_dict(
            tensors={
                "prompts": torch.tensor([prompt]),
                "responses": torch.tensor([ids]),
                "attention_mask": torch.ones(1, len(prompt) + len(ids), dtype=torch.long),
            },
            non_tensors={
                name: np.array([value, None], dtype=object)[:1] for name, value in column.items()
            },
        )

    async def rewards(*overrides: str) -> list[float]:
        config = compose("ppo_trainer", [*overrides, f"actor_rollout_ref.model.path={model}"])
        worker = RewardLoopWorker(config, address)
        found = [(await worker.compute_score_batch(batch(each)))[0] for each in task["samples"]]
        return [each["reward_score"] for each in found]

    model = task["model"]
    enabled = ["reward.reward_model.enable=True", f"reward.reward_model.model_path={model}"]
    folder = Path(package.__file__).parent / "trainer/config"
    with initialize_config_dir(str(folder), version_base=None):
        ours = [each for each in task["example"] if "model.path=" not in each]
        return {
            "compute_score_async": asyncio.run(rewards(*ours)),
            "compute_score": asyncio.run(
                rewards(*ours, "reward.custom_reward_function.name=compute_score")
            ),
            **{
                name: asyncio.run(rewards(*enabled, f"reward.reward_model.rollout.name={name}"))
                for name in ("vllm", "sglang")
            },
        }


def skyrl(task: Task) -> Rewards:
    """Environments as its generator makes them."""
    import skyrl_gym
    from skyrl_gym.envs import register

    sys.path.insert(0, str(Path(task["file"]).parent))
    register(id="rayward", entry_point="my_file:RewardEnv")
    found = []
    for sample in task["samples"]:
        extras = {"max_turns": 1, "reward_spec": {}, "url": task["url"]}
        env = skyrl_gym.make("rayward", env_config={}, extras=extras)
        env.init(user(sample))
        step = env.step(sample["completion"])
        assert step["done"]
        found.append(step["reward"])
        env.close()
    return {"environment": found}


def nemo_rl(task: Task) -> Rewards:
    """The environment's actor, as its data's set-up makes it, and its rollouts' question."""
    sys.path[:0] = [task["sources"] + "/NeMo-RL", str(Path(task["file"]).parent)]
    bare("nemo_rl.models.generation")
    import my_file  # noqa: F401
    import ray
    from nemo_rl.distributed.batched_data_dict import BatchedDataDict
    from nemo_rl.environments.utils import create_env
    from nemo_rl.experience.rollouts import calculate_rewards

    ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    env = create_env("rayward", {"url": task["url"], "prompt_key": "problem"})
    logs = [
        [
            {"role": "user", "content": f"<templated>{sample['prompt']}</templated>"},
            {"role": "assistant", "content": sample["completion"]},
        ]
        for sample in task["samples"]
    ]
    batch = BatchedDataDict(
        message_log=logs,
        task_name=["ours"] * len(logs),
        extra_env_info=[{"problem": sample["prompt"]} for sample in task["samples"]],
    )
    found = calculate_rewards(batch, {"ours": env}).rewards.tolist()
    ray.shutdown()
    return {"environment": found}


def slime(task: Task) -> Rewards:
    """Its remote reward model, of prompts as messages and as templated text."""
    sys.path.insert(0, task["sources"] + "/slime")
    from slime.rollout.rm_hub import batched_async_rm
    from slime.utils.types import Sample

    tokenizer = tokenizer_of(task)
    url = task["url"] + "/reward/slime"
    args = SimpleNamespace(rm_type="remote_rm", rm_url=url, custom_rm_path=None)

    async def rewards() -> Rewards:
        found = {}
        for way in ("messages", "text"):
            samples = []
            for sample in task["samples"]:
                prompt: Any = user(sample)
                response = sample["completion"] + tokenizer.eos_token
                if way == "text":
                    prompt = tokenizer.apply_chat_template(
                        prompt, tokenize=False, add_generation_prompt=True
                    )
                samples.append(Sample(prompt=prompt, response=response))
            found[way] = await batched_async_rm(args, samples)
        return found

    return asyncio.run(rewards())


def llama_factory(task: Task) -> Rewards:
    """What its PPO trainer calls for `reward_model_type: api`."""
    bare("llamafactory.train", "llamafactory.train.ppo")
    from llamafactory.train.ppo.ppo_utils import get_rewards_from_server

    tokenizer = tokenizer_of(task)
    texts = [
        tokenizer.apply_chat_template(conversation(sample), tokenize=False)
        for sample in task["samples"]
    ]
    return {"api": get_rewards_from_server(task["url"] + "/v1/score/evaluation", texts).tolist()}


def areal(task: Task) -> Rewards:
    """Its wrapper, which calls the user's function in processes."""
    bare("areal", "areal.api")
    from areal.api.reward_api import AsyncRewardWrapper

    sys.path.insert(0, str(Path(task["file"]).parent))
    from my_file import rayward

    tokenizer = tokenizer_of(task)

    async def reward(sample: Task) -> Any:
        ids = [*tokenizer(sample["completion"])["input_ids"], tokenizer.eos_token_id]
        try:
            return await AsyncRewardWrapper(rayward)(
                "templated", tokenizer.decode(ids), [], ids, messages=user(sample), answer=""
            )
        except ValueError:
            return REFUSED

    async def rewards() -> list[Any]:
        return await asyncio.gather(*map(reward, [*task["samples"], task["long"]]))

    return {"reward_fn": asyncio.run(rewards())}


def ms_swift(task: Task) -> Rewards:
    """What its GRPO trainer calls, with the plugin's reward function."""
    import torch
    from swift.rewards import orms
    from swift.rl_core.data import GRPOSample
    from swift.rl_core.grpo_algorithm import score_completions
    from swift.utils import import_external_file

    import_external_file(task["file"])

    def rewards(*samples: Task) -> list[Any]:
        rows = [GRPOSample.from_row({"messages": conversation(each)}) for each in samples]
        found = score_completions(rows, [orms["rayward"]()], [None], False, torch.device("cpu"))
        return found[:, 0].tolist()

    found = rewards(*task["samples"])
    try:
        rewards(task["samples"][0], task["long"])
    except ValueError:
        found.append(REFUSED)
    return {"plugin": found}


def verifiers(task: Task) -> Rewards:
    """The scoring of a task whose configuration names the reward."""
    import verifiers.v1 as vf
    from verifiers.v1.graph import MessageNode

    async def reward(sample: Task) -> Any:
        plugged = {"rayward": {"fn": task["file"] + ":rayward"}}
        ours = vf.Task(vf.TaskData(prompt=sample["prompt"]), vf.TaskConfig(rewards=plugged))
        trace = vf.Trace(
            task=vf.TraceTask(type="Task", data=ours.data),
            agent=vf.AgentInfo(config=vf.AgentConfig()),
            nodes=[
                MessageNode(message=vf.UserMessage(content=sample["prompt"])),
                MessageNode(
                    parent=0,
                    message=vf.AssistantMessage(content=sample["completion"]),
                    sampled=True,
                ),
            ],
        )
        try:
            await ours.score(trace)
        except vf.TaskError:
            return REFUSED
        return trace.reward

    async def rewards() -> list[Any]:
        return await asyncio.gather(*map(reward, [*task["samples"], task["long"]]))

    return {"reward": asyncio.run(rewards())}


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](json.load(sys.stdin))))
