"""The probe: it finds the fastest exact path, and refuses every one that is wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, VOCAB_SIZE, engine, groups, make_network, transformers_own

from reward_actor.engine import attention, decoder, paged
from reward_actor.engine.engine import Engine, UnscorableModel
from reward_actor.engine.twin import other_layer, twin
from reward_actor.model.reward_model import RewardModel

PADDED = {"gemma2", "bloom"}  # soft-capped attention, ALiBi
PAGED = ", paged" if paged.is_better(32, torch.device("cpu")) else ""
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
        assert found.path == ("forest in blocks" if family in IN_BLOCKS else "forest") + PAGED
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
    assert found.path == "forest in blocks" + PAGED
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


# ---- half precision: judged by a float32 twin


@pytest.mark.parametrize("family", [*FAMILIES, "smollm3", "helium"])
def test_bfloat16_takes_the_path_that_float32_allows(family: str) -> None:
    network = make_network(family)
    exact = Engine(RewardModel(network).eval()).path
    assert Engine(RewardModel(network.to(torch.bfloat16)).eval()).path == exact


def hybrid(dtype: torch.dtype) -> RewardModel:
    """Qwen3.5: three layers with a recurrent state to one of softmax attention."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    text = {
        "vocab_size": VOCAB_SIZE, "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32,
        "linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 32,
        "linear_value_head_dim": 32, "full_attention_interval": 4, "pad_token_id": 0,
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2,
              "out_hidden_size": 64, "num_position_embeddings": 64}  # fmt: skip
    config = AutoConfig.for_model(
        "qwen3_5", text_config=text, vision_config=vision, num_labels=1, pad_token_id=0
    )
    torch.manual_seed(0)
    return RewardModel(AutoModelForSequenceClassification.from_config(config, dtype=dtype)).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_network_with_recurrent_layers_is_never_packed(dtype: torch.dtype) -> None:
    model = hybrid(dtype)
    found = Engine(model)
    assert found.path == "padded"
    assert "(linear_attention), through which sequences" in (found.fallback_reason or "")
    with pytest.raises(ValueError, match=r"cannot be packed.*linear_attention"):
        Engine(model, "forest")
    model.network.config.get_text_config().layer_types = None
    assert other_layer(model) is not None, "by its modules, too"


def test_hidden_states_that_are_no_numbers_are_called_so() -> None:
    network = make_network("llama")
    network.model.layers[1].mlp.down_proj.weight.data *= 1e30
    with pytest.raises(UnscorableModel, match=r"not finite in float16.*overflow"):
        Engine(RewardModel(network.half()).eval())


def test_a_twin_of_a_large_network_is_small() -> None:
    from transformers import LlamaConfig, LlamaForSequenceClassification, MixtralConfig
    from transformers import MixtralForSequenceClassification as Mixtral

    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
             "num_attention_heads": 32, "num_key_value_heads": 8, "num_labels": 1}  # fmt: skip
    with torch.device("meta"):
        dense = LlamaForSequenceClassification(LlamaConfig(**sizes, vocab_size=128256))
        experts = Mixtral(MixtralConfig(**sizes, num_local_experts=64))
    for network, most in ((dense, 1.9e9), (experts, 14e9)):
        made = twin(RewardModel(network.to(torch.bfloat16)))
        assert sum(p.numel() * 4 for p in made.parameters()) < most
        assert {p.dtype for p in made.parameters()} == {torch.float32}
    assert dense.config.num_hidden_layers == 32, "the network's own configuration is as it was"


def test_a_twin_has_every_kind_of_layer() -> None:
    kinds = ["sliding_attention"] * 5 + ["full_attention"]
    network = make_network("gemma3", num_hidden_layers=12, layer_types=2 * kinds)
    before = torch.random.get_rng_state()
    made = twin(RewardModel(network.to(torch.bfloat16)))
    assert made.network.config.layer_types == kinds
    assert len(made.backbone.layers) == 6
    assert torch.equal(before, torch.random.get_rng_state()), "a training's own random numbers"
    late = ["sliding_attention"] * 11 + ["full_attention"]
    made = twin(RewardModel(make_network("gemma3", num_hidden_layers=12, layer_types=late)))
    assert made.network.config.layer_types == ["sliding_attention", "full_attention"]


def test_a_network_that_has_no_twin_is_not_packed() -> None:
    network = make_network("llama").to(torch.bfloat16)

    class Picky(type(network)):  # type: ignore[misc]
        def __init__(self, config: Any) -> None:  # noqa: ARG002
            raise KeyError("only from its own directory")

    network.__class__ = Picky
    found = Engine(RewardModel(network).eval())
    assert found.path == "padded"
    assert "no float32 twin proves it (KeyError" in (found.fallback_reason or "")
