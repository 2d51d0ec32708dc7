"""Model shapes of the benchmark, and networks of that shape with random weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

WEIGHTS_SEED = 7


@dataclass(frozen=True)
class Shape:
    """A decoder's sizes, under the names of a transformers config of type `model_type`."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int

    @property
    def layer_parameters(self) -> int:
        """Entries of the matrices in all decoder layers; norms and embeddings are no products."""
        heads = 2 * self.num_attention_heads + 2 * self.num_key_value_heads
        attention = self.hidden_size * heads * self.head_dim
        return self.num_hidden_layers * (attention + 3 * self.hidden_size * self.intermediate_size)

    def config_settings(self) -> dict[str, Any]:
        """What a transformers config is made from, without its model type."""
        sizes = {k: v for k, v in asdict(self).items() if k != "model_type"}
        # "regression" makes vLLM return the head's output as it is, without a sigmoid.
        return {
            **sizes,
            "num_labels": 1,
            "problem_type": "regression",
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "use_cache": False,
            "tie_word_embeddings": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
        }


SHAPES = {
    "tiny": Shape("llama", 64, 96, 2, 2, 1, 32, 512, 2048),
    "79m": Shape("llama", 768, 2048, 12, 12, 4, 64, 4096, 2048),
    # Heads of real models in a body like that of the 79m, with about as many parameters: Qwen3-0.6B
    # (2 query heads to a key head, 128 wide), Llama-3.2-1B (4, 64 wide), Qwen2.5-3B (8, 128 wide).
    "79m-16on8x128": Shape("qwen3", 768, 2048, 8, 16, 8, 128, 4096, 2048),
    "79m-32on8x64": Shape("llama", 768, 2048, 9, 32, 8, 64, 4096, 2048),
    "79m-16on2x128": Shape("qwen3", 768, 2048, 9, 16, 2, 128, 4096, 2048),
    "0.6b": Shape("qwen3", 1024, 3072, 28, 16, 8, 128, 151_936, 40_960),
    "1b": Shape("llama", 2048, 8192, 16, 32, 8, 64, 128_256, 8192),
    "8b": Shape("llama", 4096, 14_336, 32, 32, 8, 128, 128_256, 8192),
}


def build_network(shape: Shape, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """`empty_network` with random weights.

    The same weights for the same shape, dtype and kind of device, in every process. Matrices are
    drawn wide enough for every layer's attention to show in the rewards, which spread by about 1.
    """
    import torch

    network = empty_network(shape, dtype, device)
    generator = torch.Generator(device).manual_seed(WEIGHTS_SEED)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.dim() < 2:
                parameter.fill_(1.0)
            else:
                std = 1.0 if "embed" in name else float(parameter.shape[-1]) ** -0.5
                parameter.normal_(std=std, generator=generator)
    return network


def empty_network(shape: Shape, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """A sequence classifier with one label in evaluation mode, made on the device itself, whose
    weights are whatever lay there."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification, initialization

    config = AutoConfig.for_model(shape.model_type, **shape.config_settings())
    # transformers' own drawing would be thrown away; on the CPU it takes longer than ours.
    with torch.device(device), initialization.no_init_weights():
        network = AutoModelForSequenceClassification.from_config(
            config, dtype=dtype, attn_implementation="sdpa"
        )
    ready: PreTrainedModel = network.eval().requires_grad_(False)
    return ready


def save_network(network: PreTrainedModel, directory: Path) -> None:
    """Write the layout that vLLM loads.

    Every peer is given token ids, yet vLLM's classification asks for a tokenizer: one with a word
    for each id.
    """
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    network.save_pretrained(directory)
    words = {str(i): i for i in range(network.config.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="0").save_pretrained(directory)
