"""The probe: it finds the fastest exact path, and refuses every one that is wrong."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from families import FAMILIES, VOCAB_SIZE, engine, groups, make_network, transformers_own

from reward_actor.engine import attention, decoder
from reward_actor.engine.engine import Engine, UnscorableModel
from reward_actor.model.reward_model import RewardModel

PADDED = {"gemma2", "bloom"}  # soft-capped attention, ALiBi
IN_BLOCKS = {"llama", "qwen2", "qwen3", "mistral", "qwen3_moe", "mixtral"}


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


def test_a_window_that_a_network_ignores_is_ignored() -> None:
    """Llama with a stray `sliding_window` in its configuration, as converted models have it."""
    model = RewardModel(make_network("llama", sliding_window=16)).eval()
    found = Engine(model)
    assert found.path == "forest in blocks"
    sequences = groups(seed=6)
    own = transformers_own(model, sequences)
    np.testing.assert_allclose(found.raw_scores(sequences)[:, 0], own, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "wrong"),
    [
        *(
            (f, w)
            for f in ("llama", "mistral", "gemma3")
            for w in ("shifted keys", "shifted values")
        ),
        *((f, w) for f in ("mistral", "gemma3") for w in ("no window", "a wider window")),
    ],
)
def test_the_probe_refuses_attention_that_is_wrong(
    monkeypatch: pytest.MonkeyPatch, wrong: str, family: str, dtype: torch.dtype
) -> None:
    def broken(query, key, value, plan, scale=None, window=None):  # type: ignore[no-untyped-def]
        if wrong == "no window":
            window = None
        elif wrong == "a wider window" and window is not None:
            window += 8
        elif wrong == "shifted keys":
            key = key.roll(1, 0)
        elif wrong == "shifted values":
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
