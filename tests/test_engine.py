"""The engine: in any company a sequence gets the reward that it gets alone, in every family."""

from __future__ import annotations

import random
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import pytest
import torch
from families import FAMILIES, VOCAB_SIZE, make_network
from hypothesis import given, settings
from hypothesis import strategies as st

from reward_actor.attention import NAME
from reward_actor.engine import Engine, UnscorableModel
from reward_actor.extract import RewardModel, get_reward

PADDED = {"gemma2", "bloom"}  # soft-capped attention, ALiBi
IN_BLOCKS = {"llama", "qwen2", "qwen3", "mistral", "qwen3_moe", "mixtral"}


@cache
def engine(family: str, dtype: torch.dtype = torch.float32, attention: str = "auto") -> Engine:
    return Engine(RewardModel(make_network(family).to(dtype)).eval(), attention)  # type: ignore[arg-type]


def transformers_own(model: RewardModel, sequences: list[list[int]]) -> np.ndarray:
    """(n,) scores of each sequence alone, by the network's own forward."""
    with torch.inference_mode():
        return np.array(
            [float(model.head(model.hidden_states(torch.tensor([s]))[0, -1])) for s in sequences]
        )


def groups(seed: int, num_groups: int = 3) -> list[list[int]]:
    """Groups under one system prompt, their prompts past the window and past what is joined."""
    generate = random.Random(seed)

    def some(low: int, high: int) -> list[int]:
        return [generate.randrange(VOCAB_SIZE) for _ in range(generate.randint(low, high))]

    system = some(2, 4)
    prompts = [system + some(3, 40) for _ in range(num_groups)]
    sequences = [prompt + some(1, 30) for prompt in prompts for _ in range(4)]
    sequences += [prompts[0], sequences[0], sequences[1] + some(1, 5), some(1, 1)]
    generate.shuffle(sequences)
    return sequences


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


@pytest.mark.parametrize("family", FAMILIES)
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


@pytest.mark.parametrize("family", FAMILIES)
def test_the_probe_finds_the_fastest_exact_path(family: str) -> None:
    found = engine(family)
    if family in PADDED:
        assert found.path == "padded"
        assert found.fallback_reason
        with pytest.raises(ValueError, match="cannot be packed"):
            Engine(found.model, "forest")
    else:
        assert found.path == ("forest in blocks" if family in IN_BLOCKS else "forest")
        assert found.fallback_reason is None


@pytest.mark.parametrize("family", FAMILIES)
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


def test_a_network_that_attends_to_padding_is_refused() -> None:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    bert = BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCAB_SIZE, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=32, num_labels=1, initializer_range=0.3,
        )
    )  # fmt: skip
    with pytest.raises(UnscorableModel, match="attends to padding"):
        Engine(RewardModel(bert).eval())


def test_nonsense_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="attention is 'flash'"):
        Engine(engine("llama").model, "flash")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_batch_tokens is 0"):
        Engine(engine("llama").model, max_batch_tokens=0)


def test_no_sequences_are_no_scores() -> None:
    assert engine("llama").raw_scores([]).shape == (0, 1)
    assert engine("llama").token_scores([]) == []


@pytest.mark.parametrize("attention", ["forest", "padded"])
def test_out_of_memory_halves_the_budget_and_goes_on(attention: str) -> None:
    """With the address space limited for real: what does not fit at once fits in parts."""
    script = f"""
        import resource, sys
        import numpy as np, torch
        sys.path.insert(0, "tests")
        from families import make_network
        from reward_actor.engine import Engine
        from reward_actor.extract import RewardModel
        torch.set_num_threads(1)
        model = RewardModel(make_network("llama", hidden_size=256, num_hidden_layers=2)).eval()
        engine = Engine(model, {attention!r}, max_batch_tokens=20_000)
        generate = np.random.default_rng(0)
        sequences = [generate.integers(0, 400, 300).tolist() for _ in range(60)]
        expected = Engine(model, {attention!r}, max_batch_tokens=600).raw_scores(sequences)
        size = next(line for line in open("/proc/self/status") if line.startswith("VmSize"))
        limit = int(size.split()[1]) * 1024 + 20 * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        scores = engine.raw_scores(sequences)
        assert 300 <= engine.max_batch_tokens < 20_000, engine.max_batch_tokens
        assert np.abs(scores - expected).max() < 1e-5
        try:
            engine.raw_scores([[1] * 200_000])
        except RuntimeError as error:
            print("refused:", str(error)[-60:], engine.max_batch_tokens)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "refused:" in done.stdout  # one sequence that does not fit is its caller's to know


@pytest.mark.parametrize("family", FAMILIES)
def test_get_reward_needs_no_side_of_padding(family: str) -> None:
    network = engine(family).model.network
    rows = [s for s in groups(seed=5, num_groups=2) if len(s) <= 60][:6]
    width = 64
    expected = transformers_own(engine(family).model, rows)
    for left in (0.0, 1.0, 0.5):
        ids = torch.full((len(rows), width), 3)
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        for index, row in enumerate(rows):
            start = int(left * (width - len(row)))
            ids[index, start : start + len(row)] = torch.tensor(row)
            mask[index, start : start + len(row)] = 1
        with torch.inference_mode():
            logits, scores, last = get_reward(network, ids, 3, 0, mask)
        assert logits.shape == (len(rows), width)
        assert mask.gather(1, last[:, None]).all()
        np.testing.assert_allclose(scores.numpy(), expected, atol=2e-5, rtol=0)


@settings(max_examples=50, deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(0, 3), min_size=8, max_size=8), min_size=1, max_size=4),
    context_length=st.integers(0, 8),
)
def test_without_a_mask_get_reward_is_open_instructs(
    rows: list[list[int]], context_length: int
) -> None:
    """All three results against its procedure, step by step (open_instruct/model_utils.py)."""
    pad = 3
    rows = [row for row in rows if set(row) != {pad}] or [[1] * 8]
    ids = torch.tensor(rows)
    network = engine("llama").model.network
    with torch.inference_mode():
        logits, scores, last = get_reward(network, ids, pad, context_length)
        real = ids != pad
        hidden = network.model(
            input_ids=ids * real,
            attention_mask=real,
            position_ids=real.cumsum(1) - real.long(),
            use_cache=False,
        ).last_hidden_state
        expected = network.score(hidden)[..., 0]
    for row in range(len(rows)):
        first_pad = next((i for i in range(context_length, 8) if rows[row][i] == pad), 8)
        assert int(last[row]) == first_pad - 1
        torch.testing.assert_close(scores[row], expected[row, first_pad - 1], atol=1e-5, rtol=0)
        at_real = real[row]
        torch.testing.assert_close(logits[row][at_real], expected[row][at_real], atol=1e-5, rtol=0)


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


def test_a_window_that_a_network_ignores_is_ignored() -> None:
    """Llama with a stray `sliding_window` in its configuration, as converted models have it."""
    model = RewardModel(make_network("llama", sliding_window=16)).eval()
    found = Engine(model)
    assert found.path == "forest in blocks"
    sequences = groups(seed=6)
    own = transformers_own(model, sequences)
    np.testing.assert_allclose(found.raw_scores(sequences)[:, 0], own, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
@pytest.mark.parametrize(
    "wrong", ["no window", "one more key", "the neighbour's keys", "late by one"]
)
def test_the_probe_refuses_attention_that_is_wrong(
    monkeypatch: pytest.MonkeyPatch, wrong: str, family: str, dtype: torch.dtype
) -> None:
    from reward_actor import attention, decoder

    if wrong in ("no window", "one more key") and family == "llama":
        pytest.skip("it has no window")

    def broken(query, key, value, plan, scale=None, window=None):  # type: ignore[no-untyped-def]
        if wrong == "no window":
            window = None
        elif wrong == "one more key" and window is not None:
            window += 8
        elif wrong == "the neighbour's keys":
            key = key.roll(1, 0)
        elif wrong == "late by one":
            value = value.roll(1, 0)
        return attention.path_attention(query, key, value, plan, scale, window)

    monkeypatch.setattr(attention, "attend", broken)
    monkeypatch.setattr(decoder, "attend", broken)
    # A window of thousands of tokens, as real models have it: the probe has to shorten it.
    more = {} if family == "llama" else {"sliding_window": 300}
    model = RewardModel(make_network(family, **more).to(dtype)).eval()
    found = Engine(model)
    assert found.path == "padded"
    assert "differ by" in (found.fallback_reason or "")


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
