"""The engine: in any company a sequence gets the reward that it gets alone, in every family."""

from __future__ import annotations

import random
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from families import (
    FAMILIES,
    SOME_FAMILIES,
    VOCAB_SIZE,
    engine,
    groups,
    make_network,
    transformers_own,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from reward_actor.engine.attention import NAME
from reward_actor.engine.engine import Engine
from reward_actor.model.reward_model import RewardModel


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_scores_each_sequence_as_if_it_were_alone(family: str) -> None:
    sequences = groups(seed=1)
    together = engine(family).raw_scores(sequences)[:, 0]
    assert together.dtype == np.float32
    own = transformers_own(engine(family).model, sequences)
    assert np.ptp(own) > 0.1  # or agreement would mean nothing
    np.testing.assert_allclose(together, own, atol=1e-5, rtol=0)
    alone = [engine(family).raw_scores([sequence])[0, 0] for sequence in sequences]
    np.testing.assert_allclose(together, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", SOME_FAMILIES)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10**6), budget=st.integers(1, 300), data=st.data())
def test_budget_order_and_neighbours_change_no_reward(
    family: str, seed: int, budget: int, data: st.DataObject
) -> None:
    sequences = groups(seed, num_groups=2)
    whole = engine(family).raw_scores(sequences)[:, 0]
    chosen = data.draw(st.permutations(range(len(sequences))))[: data.draw(st.integers(1, 12))]
    small = Engine.__new__(Engine)  # the same path without another probe
    small.__dict__.update(engine(family).__dict__, max_batch_tokens=budget)
    some = small.raw_scores([sequences[i] for i in chosen])[:, 0]
    np.testing.assert_allclose(some, whole[chosen], atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_bfloat16_moves_a_reward_no_more_than_bfloat16_itself(family: str) -> None:
    """Alone against in a batch, the packed path stays within the distance that the family's own
    padded forward in bfloat16 keeps from float32."""
    sequences = groups(seed=2)
    half = engine(family, torch.bfloat16)
    exact = engine(family).raw_scores(sequences)[:, 0]
    padded = engine(family, torch.bfloat16, "padded").raw_scores(sequences)[:, 0]
    together = half.raw_scores(sequences)[:, 0]
    alone = np.array([half.raw_scores([sequence])[0, 0] for sequence in sequences])

    def apart(ours: np.ndarray, theirs: np.ndarray) -> float:  # root mean square
        return float(np.sqrt(np.mean((ours - theirs) ** 2)))

    noise = apart(padded, exact)
    assert 0 < noise < 0.1
    assert apart(together, alone) <= noise
    assert apart(together, exact) <= 2 * noise


@pytest.mark.parametrize("family", ["llama", "gemma3", "gemma2"])
def test_every_token_gets_the_reward_of_the_sequence_that_ends_there(family: str) -> None:
    sequences = groups(seed=3, num_groups=1)
    for sequence, scores in zip(sequences, engine(family).token_scores(sequences), strict=True):
        ends = sorted({1, len(sequence) // 2 + 1, len(sequence)})
        expected = transformers_own(engine(family).model, [sequence[:end] for end in ends])
        assert scores.shape == (len(sequence), 1)
        np.testing.assert_allclose(scores[[end - 1 for end in ends], 0], expected, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "phi3", "bloom"])
def test_several_heads_are_one_pass(family: str) -> None:
    model = RewardModel(make_network(family, num_labels=3)).eval()
    sequences = groups(seed=4, num_groups=1)
    scores = Engine(model).raw_scores(sequences)
    assert scores.shape == (len(sequences), 3)
    with torch.inference_mode():
        alone = [model.head(model.hidden_states(torch.tensor([s]))[0, -1]) for s in sequences]
    np.testing.assert_allclose(scores, torch.stack(alone).numpy(), atol=1e-5, rtol=0)


def test_nonsense_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="attention is 'flash'"):
        Engine(engine("llama").model, "flash")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_batch_tokens is 0"):
        Engine(engine("llama").model, max_batch_tokens=0)


def test_no_sequences_are_no_scores() -> None:
    assert engine("llama").raw_scores([]).shape == (0, 1)
    assert engine("llama").token_scores([]) == []


@pytest.mark.process
@pytest.mark.parametrize("attention", ["forest", "padded"])
def test_out_of_memory_halves_the_budget_and_goes_on(attention: str) -> None:
    """With the address space limited for real: what does not fit at once fits in parts."""
    script = f"""
        import resource, sys
        import numpy as np, torch
        sys.path.insert(0, "tests/helpers")
        from families import make_network
        from reward_actor.engine.engine import Engine
        from reward_actor.model.reward_model import RewardModel
        torch.set_num_threads(1)
        model = RewardModel(make_network("llama", hidden_size=256, num_hidden_layers=2)).eval()
        engine = Engine(model, {attention!r}, max_batch_tokens=20_000)
        generate = np.random.default_rng(0)
        sequences = [generate.integers(0, 400, 300).tolist() for _ in range(60)]
        expected = Engine(model, {attention!r}, max_batch_tokens=600).raw_scores(sequences)
        size = next(line for line in open("/proc/self/status") if line.startswith("VmSize"))
        limit = int(size.split()[1]) * 1024 + 40 * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        scores = engine.raw_scores(sequences)
        assert 300 <= engine.max_batch_tokens < 20_000, engine.max_batch_tokens
        assert np.abs(scores - expected).max() < 1e-5
        try:
            engine.raw_scores([[1] * 200_000])
        except (RuntimeError, MemoryError) as error:
            print("refused:", str(error)[-60:], engine.max_batch_tokens)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "refused:" in done.stdout  # one sequence that does not fit is its caller's to know


# ---- what once slipped through: positions by batch, windows, threads, memory


def test_frequencies_that_follow_the_longest_sequence_follow_no_neighbour() -> None:
    """Phi-3's longrope has two sets, for sequences up to its first length and for longer ones."""
    half = 16  # of the head's width
    network = make_network(
        "phi3",
        max_position_embeddings=512,
        original_max_position_embeddings=64,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10_000.0,
            "short_factor": [1.0] * half,
            "long_factor": [4.0] * half,
            "original_max_position_embeddings": 64,
        },
    )
    model = RewardModel(network).eval()
    generate = random.Random(0)
    prompt = [generate.randrange(VOCAB_SIZE) for _ in range(40)]
    sequences = [
        prompt + [generate.randrange(VOCAB_SIZE) for _ in range(n)] for n in (3, 24, 25, 100)
    ]
    own = transformers_own(model, sequences)
    for attention in ("auto", "padded"):
        scores = Engine(model, attention).raw_scores(sequences)[:, 0]  # type: ignore[arg-type]
        np.testing.assert_allclose(scores, own, atol=1e-5, rtol=0)


def test_dynamic_frequencies_are_refused_where_they_depend_on_the_past() -> None:
    parameters = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}
    network = make_network("llama", max_position_embeddings=64, rope_parameters=parameters)
    found = Engine(RewardModel(network).eval())
    sequences = [[5] * 64, [6] * 10]
    own = transformers_own(found.model, sequences)
    np.testing.assert_allclose(found.raw_scores(sequences)[:, 0], own, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="sequence 1 has 65 tokens; beyond 64"):
        found.raw_scores([[5], [5] * 65])
    assert found.longest == 64


def test_threads_take_turns() -> None:
    """The path through `transformers`' own forward switches the attention of a shared network."""
    found = Engine(RewardModel(make_network("gemma3")).eval())
    other = Engine(found.model, "padded")
    sequences = groups(seed=7)
    expected = found.raw_scores(sequences)
    with ThreadPoolExecutor(4) as pool:
        several = [pool.submit(e.raw_scores, sequences) for e in [found, other] * 6]
        for scores in several:
            np.testing.assert_allclose(scores.result(), expected, atol=1e-5, rtol=0)
    assert found.model.backbone.config._attn_implementation != NAME


@pytest.mark.parametrize("attention", ["forest", "padded"])
def test_an_empty_sequence_is_named(attention: str) -> None:
    with pytest.raises(ValueError, match="sequence 1 is empty"):
        engine("llama", attention=attention).raw_scores([[5], []])


def test_one_lack_of_memory_does_not_starve_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Engine(engine("llama").model, max_batch_tokens=4096)
    sequences = groups(seed=8)
    expected = found.raw_scores(sequences)
    real, calls = found._heads, []

    def once(hidden: torch.Tensor) -> np.ndarray:
        calls.append(len(hidden))
        if len(calls) == 1:
            raise torch.OutOfMemoryError("out of memory, once")
        return real(hidden)

    monkeypatch.setattr(found, "_heads", once)
    np.testing.assert_allclose(found.raw_scores(sequences), expected, atol=1e-5, rtol=0)
    assert found.max_batch_tokens == 2048
    for _ in range(20):
        calls.clear()
        found.raw_scores([[5], [6]])
    assert found.max_batch_tokens == 256  # never so few that every sequence goes alone


def test_weights_leave_the_device_and_return_as_they_were() -> None:
    """Between a CPU and itself: that its tensors are new ones shows that all were moved."""
    from reward_actor.engine.memory import give_back

    ours = Engine(RewardModel(make_network("qwen2")), "forest", max_batch_tokens=100)
    sequences = groups(seed=4)
    before = ours.raw_scores(sequences)
    tensors = dict(ours.model.state_dict(keep_vars=True))
    places = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    ours.offload()
    for name, tensor in ours.model.state_dict(keep_vars=True).items():
        assert tensor is tensors[name], "whoever refers to it finds it"
        assert tensor.data_ptr() != places[name]
    give_back()
    ours.restore()
    np.testing.assert_array_equal(ours.raw_scores(sequences), before)
