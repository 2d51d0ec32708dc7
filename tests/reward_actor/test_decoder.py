"""The decoder in blocks of rows: compiled or not, over block borders, and only where it fits."""

from __future__ import annotations

import random

import pytest
import torch
from families import VOCAB_SIZE, make_network

from reward_actor.engine import decoder
from reward_actor.engine.decoder import Decoder
from reward_actor.engine.packing import ForestPacking
from reward_actor.model.reward_model import RewardModel


def some_sequences(seed: int) -> list[list[int]]:
    generate = random.Random(seed)
    lengths = [generate.randint(1, 700) for _ in range(generate.randint(1, 4))]
    return [[generate.randrange(VOCAB_SIZE) for _ in range(length)] for length in lengths]


def test_the_size_of_a_block_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = RewardModel(make_network("qwen3")).eval()
    path = ForestPacking(model, Decoder(model.backbone))
    with torch.inference_mode():
        [batch] = path.plan(some_sequences(0), 10**6)
        whole, every = batch.pooled(), batch.every_token()
        monkeypatch.setattr(decoder, "_CPU_BLOCK_ROWS", 7)
        torch.testing.assert_close(batch.pooled(), whole, atol=1e-5, rtol=0)
        for ours, theirs in zip(batch.every_token(), every, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_another_build_is_refused() -> None:
    for family in ("gemma3", "olmo2", "phi3", "gpt2"):
        with pytest.raises(ValueError, match="not built like Llama"):
            Decoder(RewardModel(make_network(family)).backbone)


@pytest.mark.process
def test_compiled_blocks_agree_and_never_recompile_in_steady_state() -> None:
    """One graph for all layers and all sizes: after the first few sizes the compiler rests."""
    model = RewardModel(make_network("qwen3", num_hidden_layers=2)).eval().requires_grad_(False)
    compiled = ForestPacking(model, Decoder(model.backbone, compiled=True))
    eager = ForestPacking(model, Decoder(model.backbone))
    with torch.inference_mode():
        for sequences in ([[5]], [[5, 6, 7]], [*some_sequences(1), [1, 2]]):  # 1, and more than 1
            compiled.plan(sequences, 10**6)[0].pooled()
        with torch._dynamo.config.patch(error_on_recompile=True):
            for seed in range(2, 12):
                sequences = some_sequences(seed)
                ours = compiled.plan(sequences, 10**6)[0].pooled()
                theirs = eager.plan(sequences, 10**6)[0].pooled()
                torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)
