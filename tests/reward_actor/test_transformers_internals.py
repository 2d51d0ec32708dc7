"""The private names of `transformers` that are used are where they were."""

from __future__ import annotations

import torch
from families import make_network

from reward_actor.transformers_internals import (
    attention_is,
    attention_of,
    initialise,
    router_recorders,
    tied_weights,
)


def test_layers_look_their_attention_up_at_each_call() -> None:
    network = make_network("llama")
    config = network.model.config
    before = attention_of(config)
    ids = torch.tensor([[5, 6, 7]])
    with attention_is(config, "eager"):
        assert attention_of(config) == "eager"
        kept = network.model(ids, use_cache=False, output_attentions=True)
    assert attention_of(config) == before != "eager"
    assert kept.attentions, "only eager attention returns its weights"


def test_the_routers_of_a_mixture_of_experts_are_found() -> None:
    backbone = make_network("qwen3_moe").model
    [(kind, _, _)] = router_recorders(backbone)
    assert any(isinstance(module, kind) for module in backbone.modules())
    assert router_recorders(make_network("llama").model) == []


def test_a_modules_buffers_are_computed_again() -> None:
    network = make_network("llama")
    rotary = network.model.rotary_emb
    expected = rotary.inv_freq.clone()
    rotary.inv_freq.zero_()
    initialise(network, rotary)
    torch.testing.assert_close(rotary.inv_freq, expected)


def test_tied_weights_are_named() -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(vocab_size=10, hidden_size=8, num_hidden_layers=1, intermediate_size=8,
                         num_attention_heads=2, num_key_value_heads=1, head_dim=4)  # fmt: skip
    assert tied_weights(Qwen3ForCausalLM(config)) == {"lm_head.weight"}
