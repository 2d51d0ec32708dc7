"""What is measured. Every round runs all variants of a workload, the first another each round."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import ray
from ray import serve

from benchmarks.common import vllm_peer
from benchmarks.common.channel import Child
from benchmarks.common.processes import free_port
from benchmarks.common.report import max_abs_diff
from benchmarks.common.rounds import TOLERANCES
from benchmarks.rollout.models import (
    make_policy,
    make_reward_model,
    prompts,
    with_other_template,
    word_ids,
)
from benchmarks.rollout.simulated import SimulatedPool, SimulatedSettings
from reward_actor.client.handle import RewardHandle
from reward_actor.cluster import connect
from reward_actor.rollout import RolloutGroup, RolloutPool, Sampling, VllmSettings
from reward_actor.rollout.policy import Policy, group_to_score
from serve.app import APP_NAME, start
from serve.config import ServeConfig

Run = dict[str, float]
Runs = dict[str, dict[str, list[Run]]]
"""Of each measurement and variant the figures of its rounds."""
Variants = Mapping[str, Callable[[], Run]]

NUM_ACTORS = (1, 2, 4)
_LONGEST = 1024
_NUM_COMPLETIONS = 8


@dataclass(frozen=True)
class Scale:
    """How much is measured. networks: of `weights`; the first is that of `overlap`, too.

    max_tokens        of a completion.
    max_groups        an actor's prompts at a time, in `overlap`: twice what its engine samples in
                      `overlap-simulated`, so that it need not wait for what is being scored.
    overlap_step_s    of that simulated engine.
    step_s            of those of `actors`.
    load_tokens       of completions that are sampled while weights are updated.
    """

    networks: tuple[str, ...]
    max_tokens: int
    overlap_prompts: int
    max_groups: int
    overlap_step_s: float
    transport_prompts: int
    prompts_per_actor: int
    step_s: float
    load_tokens: int


SCALES = {
    "tiny": Scale(("tiny",), 16, 24, 8, 0.01, 24, 24, 0.02, 64),
    "5m": Scale(("5m", "20m", "80m"), 128, 64, 16, 0.01, 200, 200, 0.02, 256),
}


def overlap(scale: Scale, scratch: Path, num_rounds: int) -> Runs:
    """Groups scored as they are done, against sampling everything and then scoring everything."""
    policy = make_policy(scale.networks[0], scratch / "policy")
    settings = VllmSettings(policy, max_model_len=_LONGEST, dtype="float32", cpu_threads=1)
    # A completion ends where one more of these is sampled: after about half of its most tokens.
    words = word_ids(policy, scale.max_tokens // 2)
    eos = Policy.load(policy).prompts.tokenizer.eos_token_id
    sampling = Sampling(
        _NUM_COMPLETIONS,
        max_tokens=scale.max_tokens,
        other={"allowed_token_ids": [*words, eos]},
    )
    pool = partial(RolloutPool, settings)
    return _overlap("overlap", pool, policy, sampling, scale, scratch, num_rounds)


def overlap_simulated(scale: Scale, scratch: Path, num_rounds: int) -> Runs:
    """The same with an engine that needs no core of the scorer's."""
    policy = make_policy(scale.networks[0], scratch / "policy")
    words = tuple(word_ids(policy, scale.max_tokens))
    settings = SimulatedSettings(
        policy,
        words=words,
        step_s=scale.overlap_step_s,
        max_sequences=scale.max_groups * _NUM_COMPLETIONS // 2,
    )
    sampling = Sampling(_NUM_COMPLETIONS, max_tokens=scale.max_tokens)
    pool = partial(SimulatedPool, settings)
    return _overlap("overlap-simulated", pool, policy, sampling, scale, scratch, num_rounds)


def _overlap(
    name: str,
    make_pool: Callable[..., RolloutPool],
    policy: str,
    sampling: Sampling,
    scale: Scale,
    scratch: Path,
    num_rounds: int,
) -> Runs:
    asked = prompts(scale.overlap_prompts)
    with (
        _service(make_reward_model(policy, scratch / "reward-model")),
        make_pool(scorer=None, max_groups=scale.max_groups) as unscored,
        make_pool(scorer=APP_NAME, max_groups=scale.max_groups) as scored,
    ):
        _require_travel(scored, "token ids")
        handle = RewardHandle()
        rendering = handle.info().rendering
        assert rendering is not None
        renderer = Policy.load(policy).as_scored(rendering)
        reference: dict[tuple[int, ...], float] = {}

        def overlapped() -> Run:
            begin = time.perf_counter()
            groups = list(scored.rollouts(asked, sampling))
            seconds = time.perf_counter() - begin
            _compare(groups, [group.rewards for group in groups], reference)
            return {"seconds": seconds}

        def in_turn() -> Run:
            begin = time.perf_counter()
            groups = list(unscored.rollouts(asked, sampling))
            sampled = time.perf_counter()
            scores = handle.score_groups([group_to_score(group, renderer) for group in groups])
            end = time.perf_counter()
            _compare(groups, [of_group.rewards for of_group in scores], reference)
            return {
                "seconds": end - begin,
                "sampling_s": sampled - begin,
                "scoring_s": end - sampled,
            }

        for pool in (unscored, scored):  # not timed
            list(pool.rollouts(asked[: scale.max_groups], sampling))
        variants = {"overlapped": overlapped, "one after the other": in_turn}
        return {name: _rounds(name, variants, num_rounds)}


def transport(scale: Scale, scratch: Path, num_rounds: int) -> Runs:
    """A handle against HTTP, token ids against text: the rest of a rollout takes no time, and the
    reward model next to none."""
    policy = make_policy("tiny", scratch / "policy")
    other = with_other_template(policy, scratch / "other")
    words = tuple(word_ids(policy, scale.max_tokens))
    sampling = Sampling(_NUM_COMPLETIONS, max_tokens=scale.max_tokens)
    asked = prompts(scale.transport_prompts)
    reference: dict[tuple[int, ...], float] = {}
    with (
        _service(make_reward_model(policy, scratch / "reward-model")) as url,
        contextlib.ExitStack() as stack,
    ):

        def measured(pool: RolloutPool) -> Run:
            begin = time.perf_counter()
            groups = list(pool.rollouts(asked, sampling))
            many = time.perf_counter() - begin
            _compare(groups, [group.rewards for group in groups], reference)
            pool.supervisor.max_groups, before = 1, pool.supervisor.max_groups
            few = asked[: max(1, len(asked) // 8)]
            begin = time.perf_counter()
            list(pool.rollouts(few, sampling))
            alone = time.perf_counter() - begin
            pool.supervisor.max_groups = before
            return {"prompts_per_s": len(asked) / many, "ms_alone": 1e3 * alone / len(few)}

        variants = {}
        for model, kind in ((policy, "token ids"), (other, "text")):
            for scorer, way in ((APP_NAME, "handle"), (url, "HTTP")):
                settings = SimulatedSettings(model, words=words)
                pool = stack.enter_context(SimulatedPool(settings, scorer=scorer))
                _require_travel(pool, kind)
                list(pool.rollouts(asked, sampling))  # not timed
                variants[f"{way}, {kind}"] = partial(measured, pool)
        return {"transport": _rounds("transport", variants, num_rounds)}


def actors(scale: Scale, scratch: Path, num_rounds: int) -> Runs:
    """More simulated actors, with as many prompts for each; nothing is scored."""
    policy = make_policy("tiny", scratch / "policy")
    words = tuple(word_ids(policy, scale.max_tokens))
    settings = SimulatedSettings(policy, words=words, step_s=scale.step_s)
    sampling = Sampling(_NUM_COMPLETIONS, max_tokens=scale.max_tokens)
    with _cluster(sum(NUM_ACTORS)), contextlib.ExitStack() as stack:

        def measured(pool: RolloutPool, num_actors: int) -> Run:
            asked = prompts(num_actors * scale.prompts_per_actor)
            begin, cpu_s = time.perf_counter(), time.process_time()
            assert len(list(pool.rollouts(asked, sampling))) == len(asked)
            seconds = time.perf_counter() - begin
            return {
                "prompts_per_s": len(asked) / seconds,
                "driver_core": (time.process_time() - cpu_s) / seconds,
            }

        variants = {}
        for num_actors in NUM_ACTORS:
            pool = stack.enter_context(SimulatedPool(settings, num_actors))
            list(pool.rollouts(prompts(8 * num_actors), sampling))  # not timed
            variants[str(num_actors)] = partial(measured, pool, num_actors)
        return {"actors": _rounds("actors", variants, num_rounds)}


def weights(scale: Scale, scratch: Path, num_rounds: int) -> Runs:
    """`update_weights`, from a directory and with tensors, idle and under load, against a plain
    vLLM's `reload_weights`."""
    runs: Runs = {}
    for network in scale.networks:
        both = [make_policy(network, scratch / f"{network}-{seed}", seed) for seed in (0, 1)]
        name = f"weights {network}"
        with _cluster(1), contextlib.ExitStack() as stack:
            runs[name] = _rounds(name, _updates(both, scale, scratch, stack), num_rounds)
    return runs


def _updates(
    policies: Sequence[str], scale: Scale, scratch: Path, stack: contextlib.ExitStack
) -> Variants:
    from safetensors.torch import load_file

    environment = vllm_peer.environment(
        1, "cpu", {"VLLM_CPU_KVCACHE_SPACE": 1, "VLLM_ENABLE_V1_MULTIPROCESSING": 1}
    )
    order = {"model": policies[0], "max_model_len": _LONGEST}
    plain = Child("rollout.vllm_reload", "vllm", order, environment, scratch)
    stack.callback(plain.close)
    assert plain.ready == {}
    settings = VllmSettings(policies[0], max_model_len=_LONGEST, dtype="float32", cpu_threads=1)
    pool = stack.enter_context(RolloutPool(settings, max_groups=4))
    # Every update loads other weights than the one before.
    places = itertools.cycle((1, 0))
    tensors = [load_file(Path(policy, "model.safetensors")) for policy in policies]

    def update(given: Sequence[str | Mapping[str, object]]) -> Run:
        weights = given[next(places)]
        begin = time.perf_counter()
        pool.update_weights(weights, running="resume")  # type: ignore[arg-type]
        return {"seconds": time.perf_counter() - begin}

    def update_under_load(given: Sequence[str | Mapping[str, object]]) -> Run:
        with _load(pool, scale):
            return update(given)

    return {
        "directory, idle": partial(update, policies),
        "tensors, idle": partial(update, tensors),
        "directory, under load": partial(update_under_load, policies),
        "tensors, under load": partial(update_under_load, tensors),
        "vLLM's reload_weights, idle": lambda: plain.ask({"directory": policies[next(places)]}),
    }


@contextlib.contextmanager
def _load(pool: RolloutPool, scale: Scale) -> Iterator[None]:
    """Sample long completions meanwhile."""
    has_begun, is_over = threading.Event(), threading.Event()
    sampling = Sampling(_NUM_COMPLETIONS, max_tokens=scale.load_tokens, other={"ignore_eos": True})
    asked = itertools.takewhile(lambda _: not is_over.is_set(), itertools.cycle(prompts(8)))

    def sample() -> None:
        try:
            for _ in pool.rollouts(asked, sampling):
                has_begun.set()
        finally:  # one that raises must not be waited for
            has_begun.set()

    reading = threading.Thread(target=sample)
    reading.start()
    has_begun.wait()  # one prompt is done, and others run
    try:
        yield
    finally:
        is_over.set()
        reading.join()


def _rounds(name: str, variants: Variants, num_rounds: int) -> dict[str, list[Run]]:
    runs: dict[str, list[Run]] = {variant: [] for variant in variants}
    order = list(variants)
    for number in range(num_rounds):
        shift = number % len(order)
        for variant in order[shift:] + order[:shift]:
            run = variants[variant]()
            runs[variant].append(run)
            figures = ", ".join(f"{what} {value:.3f}" for what, value in run.items())
            print(f"{name}, {variant}: {figures}", flush=True)
    return runs


@contextlib.contextmanager
def _service(model: str) -> Iterator[str]:
    """The URL of a service with one replica of one thread, in its own Ray cluster."""
    config = ServeConfig.model_validate(
        {"model": model, "device": "cpu", "dtype": "float32", "threads_per_replica": 1}
    )
    try:
        yield start(config, port=free_port())
        serve.shutdown()
    finally:
        ray.shutdown()


def _require_travel(pool: RolloutPool, kind: str) -> None:
    if pool.travels_as != kind:
        raise ValueError(f"rollouts travel as {pool.travels_as}, not as {kind}")


def _compare(
    groups: Sequence[RolloutGroup],
    rewards: Sequence[Sequence[float | None]],
    reference: dict[tuple[int, ...], float],
) -> None:
    """Raise ValueError unless every completion has a reward, that which the same tokens had before
    if they were scored already."""
    found, expected = [], []
    for group, of_group in zip(groups, rewards, strict=True):
        for ids, reward in zip(group.completion_ids, of_group, strict=True):
            if reward is None:
                raise ValueError(f"a completion of prompt {group.index} has no reward")
            found.append(reward)
            expected.append(reference.setdefault((*group.prompt_ids, *ids), reward))
    difference = max_abs_diff(found, expected)
    if not difference <= TOLERANCES["float32"]:
        raise ValueError(f"rewards of the same tokens differ by {difference:.3g}")


@contextlib.contextmanager
def _cluster(num_actors: int) -> Iterator[None]:
    """Its own Ray cluster with room for so many actors."""
    try:
        connect(float(num_actors), log_to_driver=False)
        yield
    finally:
        ray.shutdown()


WORKLOADS: dict[str, Callable[[Scale, Path, int], Runs]] = {
    "overlap": overlap,
    "overlap-simulated": overlap_simulated,
    "transport": transport,
    "actors": actors,
    "weights": weights,
}
