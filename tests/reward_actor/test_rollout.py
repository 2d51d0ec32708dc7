"""Rollouts from real vLLM engines in Ray actors, scored where they are made."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import torch
from processes import descendants, titled

from reward_actor import Group, RewardScorer
from reward_actor.rollout import RolloutGroup, RolloutPool, Sampling, VllmSettings

if TYPE_CHECKING:
    from torch import Tensor

PROMPTS: list[Any] = ["Name two fruits.", [{"role": "user", "content": "Hi."}], "Count to three."]
SAMPLING = Sampling(num_completions=3, max_tokens=12, seed=7)
# Long ones, so that there is time to do something to the engine meanwhile.
LONG = Sampling(num_completions=3, max_tokens=90, seed=3, other={"ignore_eos": True})


@pytest.fixture(scope="module")
def pool(vllm_engine: None, service: str, base_model: Path) -> Iterator[RolloutPool]:
    """One engine for the module; its completions are scored by the service over its handle."""
    num_gpus = int(torch.cuda.is_available())
    settings = VllmSettings(
        str(base_model), num_gpus, max_model_len=128, dtype="float32", cpu_threads=2, sleeps=True
    )
    with RolloutPool(settings, 1, "rayward", hang_timeout_s=10) as started:
        yield started


def sampled(pool: RolloutPool, prompts: list[Any], sampling: Sampling) -> list[RolloutGroup]:
    groups = sorted(pool.rollouts(prompts, sampling), key=lambda group: group.index)
    assert [group.index for group in groups] == list(range(len(prompts)))
    return groups


def ids(groups: list[RolloutGroup]) -> list[list[list[int]]]:
    return [group.completion_ids for group in groups]


def test_a_rollout_is_scored_as_its_text_is(pool: RolloutPool, export_dir: Path) -> None:
    """Policy and reward model share a tokenizer: ids travel where they are those of the text."""
    assert pool.travels_as == "token ids"
    scorer = RewardScorer.from_pretrained(export_dir, "cpu")
    for prompt, group in zip(PROMPTS, sampled(pool, PROMPTS, SAMPLING), strict=True):
        assert group.prompt == prompt
        assert group.prompt_ids == scorer.renderer.prompt_ids(prompt)
        assert len(group.completions) == len(group.completion_ids) == 3
        assert group.ended_with_eos == [reason == "stop" for reason in group.finish_reasons]
        for given, log_probs, versions in zip(
            group.completion_ids, group.log_probs, group.policy_versions, strict=True
        ):
            assert 1 <= len(given) <= 12
            assert len(log_probs) == len(given)
            assert all(math.isfinite(value) and value <= 0 for value in log_probs)
            assert versions == [0] * len(given)
        [offline] = scorer.score([Group(prompt, group.completions)])
        assert group.scores is not None
        assert group.rewards == pytest.approx(offline.rewards, abs=1e-5)
        assert group.scores.model_version == offline.model_version


def test_the_same_seed_samples_the_same(pool: RolloutPool) -> None:
    first, again = (ids(sampled(pool, PROMPTS, SAMPLING)) for _ in range(2))
    other = ids(sampled(pool, PROMPTS, Sampling(num_completions=3, max_tokens=12, seed=99)))
    assert first == again
    assert first != other
    assert first[0][0] != first[0][1]
    [last] = pool.rollouts(PROMPTS[2:], SAMPLING, [2])
    assert last.index == 2
    assert last.completion_ids == first[2], "the seed belongs to the index"


def test_rollouts_come_to_an_event_loop_as_well(pool: RolloutPool) -> None:
    async def indices() -> list[int]:
        rollouts = pool.rollouts(PROMPTS, SAMPLING)
        with pytest.raises(TimeoutError):  # nothing is lost with a caller that gives up
            await asyncio.wait_for(anext(rollouts), 0.001)
        return sorted([group.index async for group in rollouts])

    assert asyncio.run(indices()) == [0, 1, 2]


def test_a_crowd_of_prompts_is_sampled(pool: RolloutPool) -> None:
    """More prompt tokens at once than vLLM reads in a step, all with seeds of their own."""
    prompts = [f"{number} " + "and a pear " * 25 for number in range(150)]
    groups = sampled(pool, prompts, Sampling(num_completions=2, max_tokens=4))
    assert all(group.error is None and len(group.completions) == 2 for group in groups)
    assert sum(len(group.prompt_ids) for group in groups) > 8192


def test_what_is_left_of_a_loop_is_given_up(pool: RolloutPool) -> None:
    for group in pool.rollouts((f"Prompt {number}" for number in range(10_000)), LONG):
        assert group.error is None
        break
    [actor] = pool.supervisor.actors()
    assert actor.num_running == actor.running_tokens == 0
    started = time.monotonic()
    sampled(pool, PROMPTS, SAMPLING)
    assert time.monotonic() - started < 20


def test_a_prompt_that_leaves_no_room_harms_no_other(pool: RolloutPool) -> None:
    long, short = sampled(pool, ["word " * 200, "Hi."], SAMPLING)
    assert long.error is not None
    assert "the policy takes 128" in long.error
    assert long.completions == []
    assert long.scores is None
    assert short.error is None
    assert len(short.completions) == 3
    assert short.scores is not None


def test_log_probabilities_are_of_what_was_sampled_from(pool: RolloutPool) -> None:
    """Near temperature 0 the sampled token is almost certain; at 1 this policy knows nothing."""
    cold = Sampling(num_completions=1, max_tokens=12, temperature=0.01)
    warm = Sampling(num_completions=1, max_tokens=12, temperature=1.0)
    means = []
    for sampling in (cold, warm):
        [group] = sampled(pool, ["Hi."], sampling)
        means.append(sum(group.log_probs[0]) / len(group.log_probs[0]))
    assert means[0] > -1.0
    assert means[1] < -3.0


def test_other_settings_of_vllm_go_by_name(pool: RolloutPool) -> None:
    [free] = sampled(pool, ["Hi."], SAMPLING)
    text = free.completions[0]
    stop = text[len(text) // 2 :][:2]
    [stopped] = sampled(pool, ["Hi."], Sampling(3, max_tokens=12, seed=7, stop=[stop]))
    assert stopped.completions[0] == text[: text.index(stop)]
    assert stopped.finish_reasons[0] == "stop"
    assert stopped.ended_with_eos[0] is False, "the policy would have gone on"
    [greedy] = sampled(pool, ["Hi."], Sampling(2, max_tokens=5, other={"top_k": 1}))
    assert greedy.completion_ids[0] == greedy.completion_ids[1]
    with pytest.raises(ValueError, match=r"vLLM does not take this sampling: .*no_such"):
        sampled(pool, ["Hi."], Sampling(other={"no_such": 1}))


# ---- several turns


def test_an_environment_answers_each_completion(pool: RolloutPool, export_dir: Path) -> None:
    """Every turn is sampled from what came before it, and has its reward."""

    async def environment(conversation: list[Any]) -> list[Any]:
        said = conversation[-1]["content"]
        if sum(map(ord, said)) % 3 == 0:
            return []
        return [{"role": "tool", "content": f"{len(said)} characters"}]

    sampling = replace(
        SAMPLING, num_completions=6, max_turns=3, other={"stop_token_ids": list(range(300, 400))}
    )
    [group] = pool.rollouts(PROMPTS[1:2], sampling, environment=environment)
    [again] = pool.rollouts(PROMPTS[1:2], sampling, environment=environment)
    assert group.conversations == again.conversations
    assert len({len(turns) for turns in group.turns}) > 1, "they part"
    scorer = RewardScorer.from_pretrained(export_dir, "cpu")
    assert group.scores is not None
    assert group.scores.turn_rewards is not None
    for place, (turns, conversation) in enumerate(
        zip(group.turns, group.conversations, strict=True)
    ):
        roles = [message["role"] for message in conversation]
        assert roles == ["user", *["assistant", "tool"] * (len(turns) - 1), "assistant"]
        for number, turn in enumerate(turns):
            before = conversation[: 1 + 2 * number]
            assert turn.prompt_ids == scorer.renderer.prompt_ids(before)
            assert turn.completion == conversation[1 + 2 * number]["content"]
            assert len(turn.log_probs) == len(turn.completion_ids) == len(turn.policy_versions)
        assert group.completion_ids[place] == turns[-1].completion_ids
        whole = Group(conversation[:-1], [group.completions[place]])
        [offline] = scorer.score([whole], turn_rewards=True)
        assert offline.turn_rewards is not None
        assert group.rewards[place] == pytest.approx(offline.rewards[0], abs=1e-5)
        assert group.scores.turn_rewards[place] == pytest.approx(offline.turn_rewards[0], abs=1e-5)
        assert len(group.scores.turn_rewards[place] or []) == len(turns)


# ---- weights


def changed(base_model: Path, seed: int) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    generator = torch.Generator().manual_seed(seed)
    weights = load_file(base_model / "model.safetensors")
    return {n: w + 0.1 * torch.randn(w.shape, generator=generator) for n, w in weights.items()}


def log_probs(base_model: Path, weights: dict[str, Tensor], group: RolloutGroup) -> list[Any]:
    """What transformers says of the completions' tokens under these weights."""
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32)
    network.load_state_dict(weights, strict=False)
    found = []
    for given in group.completion_ids:
        sequence = torch.tensor([group.prompt_ids + given])
        with torch.inference_mode():
            table = network(sequence).logits[0, len(group.prompt_ids) - 1 : -1].log_softmax(-1)
        found.append(table.gather(1, torch.tensor(given)[:, None])[:, 0].tolist())
    return found


@contextlib.contextmanager
def rollouts_meanwhile(pool: RolloutPool) -> Iterator[list[RolloutGroup]]:
    """Those of 40 prompts, begun before and read to their end."""
    groups: list[RolloutGroup] = []
    first = threading.Event()

    def read() -> None:
        for group in pool.rollouts((f"Prompt {number}" for number in range(40)), LONG):
            groups.append(group)
            first.set()

    reading = threading.Thread(target=read)
    pool.supervisor.max_groups, before = 8, pool.supervisor.max_groups
    reading.start()
    assert first.wait(60)
    yield groups
    reading.join()
    pool.supervisor.max_groups = before
    assert sorted(group.index for group in groups) == list(range(40))


def test_weights_are_updated_while_requests_run(
    pool: RolloutPool, base_model: Path, tmp_path: Path
) -> None:
    """Each token is of the version that it says, whether its completion was resumed or not."""
    from safetensors.torch import load_file, save_file

    old, new, last = (
        load_file(base_model / "model.safetensors"),
        *(changed(base_model, seed) for seed in (1, 2)),
    )
    before = ids(sampled(pool, PROMPTS, SAMPLING))

    # Three times, so that one comes in the middle of a completion.
    with rollouts_meanwhile(pool) as resumed:
        for version in (1, 2, 3):
            assert pool.update_weights(new, running="resume") == version
            time.sleep(0.1)
    kinds = {tuple(sorted(set(v))) for group in resumed for v in group.policy_versions}
    assert any(len(versions) > 1 for versions in kinds), "some were under way, and were resumed"

    (tmp_path / "weights").mkdir()
    save_file(last, tmp_path / "weights" / "model.safetensors")
    with rollouts_meanwhile(pool) as finished:
        assert pool.update_weights(tmp_path / "weights", running="finish") == 4
    kinds = {tuple(sorted(set(v))) for group in finished for v in group.policy_versions}
    assert kinds == {(3,), (4,)}

    of_version = {0: old, 1: new, 2: new, 3: new, 4: last}
    mixed = next(group for group in resumed if len(set(group.policy_versions[0])) > 1)
    late = next(iter(sampled(pool, PROMPTS, SAMPLING)))
    for group in (mixed, late):
        tables = {v: log_probs(base_model, weights, group) for v, weights in of_version.items()}
        for place, versions in enumerate(group.policy_versions):
            expected = [tables[v][place][at] for at, v in enumerate(versions)]
            assert group.log_probs[place] == pytest.approx(expected, abs=2e-3)
    assert set(late.policy_versions[0]) == {4}
    assert pool.update_weights(base_model, version=7) == 7
    assert ids(sampled(pool, PROMPTS, SAMPLING)) == before


@pytest.mark.long
def test_adapters_go_by_name(
    vllm_engine: None, ray_cluster: None, base_model: Path, tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    settings = VllmSettings(
        str(base_model), max_model_len=128, dtype="float32", cpu_threads=2, max_adapters=1
    )
    networks = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        network = AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32)
        config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        networks.append(get_peft_model(network, config))
        networks[-1].save_pretrained(tmp_path / f"adapter{seed}")
    sampling = replace(SAMPLING, adapter="mine")
    with RolloutPool(settings) as pool:
        before = ids(sampled(pool, PROMPTS, SAMPLING))
        with pytest.raises(ValueError, match="no adapter 'mine' is loaded"):
            sampled(pool, PROMPTS, sampling)
        for seed, network in enumerate(networks):
            path = tmp_path / f"adapter{seed}"
            assert pool.update_weights(path, adapter="mine") == seed + 1
            for group in sampled(pool, PROMPTS, sampling):
                for given, found, versions in zip(
                    group.completion_ids, group.log_probs, group.policy_versions, strict=True
                ):
                    assert set(versions) == {seed + 1}
                    sequence = torch.tensor([group.prompt_ids + given])
                    with torch.inference_mode():
                        logits = network(sequence).logits[0, len(group.prompt_ids) - 1 : -1]
                    table = logits.log_softmax(-1)
                    expected = table.gather(1, torch.tensor(given)[:, None])[:, 0].tolist()
                    assert found == pytest.approx(expected, abs=2e-3)
        assert ids(sampled(pool, PROMPTS, SAMPLING)) == before, "the policy itself is as it was"
        with pytest.raises(ValueError, match="max_adapters is 1; 'other' is one more"):
            pool.update_weights(tmp_path / "adapter0", adapter="other")
        with pytest.raises(ValueError, match="vLLM does not take this adapter"):
            pool.update_weights(tmp_path, adapter="mine")
        # The weights under an adapter are updated as well, an output head that is tied too.
        given = changed(base_model, 3)
        assert pool.update_weights(given) == 3
        late = next(iter(sampled(pool, PROMPTS, SAMPLING)))
        expected = log_probs(base_model, given, late)
        for found, of_one in zip(late.log_probs, expected, strict=True):
            assert found == pytest.approx(of_one, abs=2e-3)
        assert pool.update_weights(load_file(base_model / "model.safetensors")) == 4
        assert ids(sampled(pool, PROMPTS, SAMPLING)) == before


def test_weights_of_another_shape_are_refused_and_the_old_ones_stay(
    pool: RolloutPool, base_model: Path, tmp_path: Path
) -> None:
    before, version = ids(sampled(pool, PROMPTS, SAMPLING)), pool.policy_version
    good = changed(base_model, 5)
    name = next(iter(good))
    for bad, message in (
        ({**good, name: good[name][:-1]}, f"these weights: {name} is .*; the policy's is"),
        ({n: w for n, w in good.items() if n != name}, f"these weights: no {name}, which"),
        ({**good, "other": good[name]}, "these weights: other, which .* does not have"),
        (tmp_path, "holds no weights in safetensors"),
    ):
        with pytest.raises(ValueError, match=message):
            pool.update_weights(bad)  # type: ignore[arg-type]
    assert pool.policy_version == version
    assert ids(sampled(pool, PROMPTS, SAMPLING)) == before


# ---- faults


def processes_of(pool: RolloutPool) -> tuple[psutil.Process, psutil.Process]:
    """The first actor's process, and its engine core's."""
    import ray

    [pid] = [
        ray.get(a.handle.__ray_call__.remote(lambda _: os.getpid()))
        for a in pool.supervisor.actors()
    ]
    actor = psutil.Process(pid)
    [core] = titled("VLLM::EngineCore", descendants(actor))
    return actor, core


KILL_ACTOR, KILL_CORE = ("actor", signal.SIGKILL), ("core", signal.SIGKILL)
STOP_ACTOR, STOP_CORE = ("actor", signal.SIGSTOP), ("core", signal.SIGSTOP)


@pytest.mark.parametrize(
    ("num_prompts", "faults"),
    [
        (30, [KILL_ACTOR, STOP_ACTOR]),
        pytest.param(200, [KILL_ACTOR, KILL_CORE, KILL_ACTOR, STOP_CORE], marks=pytest.mark.long),
    ],
)
def test_what_a_lost_actor_sampled_is_sampled_again(
    pool: RolloutPool,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    num_prompts: int,
    faults: list[tuple[str, signal.Signals]],
) -> None:
    """After a killed actor, a killed engine core, one that hangs: the same rollouts as without."""
    prompts = [f"Prompt {number}" for number in range(num_prompts)]
    expected = ids(sampled(pool, prompts, LONG))
    monkeypatch.setattr(
        pool.supervisor, "max_groups", 6
    )  # so that some are left for the next actor
    groups: list[RolloutGroup] = []
    left, cores, harmed = list(faults), [], list[Any]()
    for group in pool.rollouts(prompts, LONG):
        groups.append(group)
        [current] = pool.supervisor.actors()
        if left and current.is_ready and current not in harmed:
            actor, core = processes_of(pool)
            cores.append(core)
            harmed.append(current)
            which, number = left.pop(0)
            os.kill(actor.pid if which == "actor" else core.pid, number)
    assert not left
    groups.sort(key=lambda group: group.index)
    assert [group.index for group in groups] == list(range(num_prompts))
    assert ids(groups) == expected
    assert all(None not in group.rewards for group in groups)
    lost = [line for line in caplog.messages if line.startswith("lost a rollout actor (")]
    assert len(lost) == len(faults)
    assert ("it has not answered for 10 s" in lost[-1]) == (faults[-1][1] == signal.SIGSTOP)
    assert psutil.wait_procs(cores, timeout=20)[1] == [], "no engine outlives its actor"


def test_a_pool_that_sleeps_gives_its_memory_back(pool: RolloutPool, base_model: Path) -> None:
    """And has its last weights afterwards, whatever number they were given."""
    pool.update_weights(changed(base_model, 6), version=0)
    before = ids(sampled(pool, PROMPTS, SAMPLING))
    _, core = processes_of(pool)
    held = core.memory_info().rss
    free = torch.cuda.mem_get_info()[0] if pool.settings.num_gpus else 0
    pool.sleep()
    if pool.settings.num_gpus:  # the engine stays, without its cache and weights
        assert torch.cuda.mem_get_info()[0] > free + 2**28
    else:
        assert psutil.wait_procs([core], timeout=20)[1] == []
        assert held > 2**28
    rollouts = pool.rollouts(PROMPTS, SAMPLING)
    waiting: list[RolloutGroup] = []
    reading = threading.Thread(target=lambda: waiting.extend(rollouts))
    reading.start()
    reading.join(timeout=2)
    assert reading.is_alive(), "prompts wait until it wakes"
    pool.wake()
    reading.join()
    assert ids(sorted(waiting, key=lambda group: group.index)) == before


def test_a_policy_that_is_not_there_is_refused(
    ray_cluster: None, tmp_path: Path, base_model: Path
) -> None:
    with pytest.raises(ValueError, match="no policy to sample from"):
        RolloutPool(VllmSettings(str(tmp_path)))
    with pytest.raises(ValueError, match="too small"):
        RolloutPool(VllmSettings(str(base_model)), 1000)
