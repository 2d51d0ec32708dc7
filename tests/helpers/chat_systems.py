"""Chat templates as known models have them, each with a tokenizer of its kind."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
_PHI4 = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)
_TULU = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content }}"
    "{% if m.role == 'assistant' and loop.last %}{{ eos_token }}{% else %}{{ '\\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
_ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + eos_token + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
_CHATGLM = (
    "{{ '[gMASK]<sop>' }}{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True)
class ChatSystem:
    """template: its source, or the name of TRL's file; rstrip: special tokens that swallow the
    white space behind them."""

    template: str
    bos: str | None
    eos: str
    pad: str
    more: tuple[str, ...] = ()
    rstrip: tuple[str, ...] = ()

    def source(self) -> str:
        if "{" in self.template:
            return self.template
        import trl

        return Path(trl.__file__).with_name("chat_templates").joinpath(self.template).read_text()


_LLAMA = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_PHI3 = ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>")
CHAT_SYSTEMS = {
    "llama 3": ChatSystem("llama3.jinja", "<|begin_of_text|>", "<|eot_id|>", "<|pad|>", _LLAMA),
    "llama 3.1": ChatSystem("llama3_1.jinja", "<|begin_of_text|>", "<|eot_id|>", "<|pad|>", _LLAMA),
    "llama 3.2": ChatSystem("llama3_2.jinja", "<|begin_of_text|>", "<|eot_id|>", "<|pad|>", _LLAMA),
    "llama 3.1, pad is the turn's end": ChatSystem(
        "llama3_1.jinja", "<|begin_of_text|>", "<|eot_id|>", "<|eot_id|>", _LLAMA
    ),
    "qwen 2.5": ChatSystem(
        "qwen2_5.jinja", None, "<|im_end|>", "<|endoftext|>", ("<|im_start|>", "<|im_end|>")
    ),
    "qwen 3": ChatSystem(
        "qwen3.jinja", None, "<|im_end|>", "<|endoftext|>", ("<|im_start|>", "<|im_end|>")
    ),
    "gemma 2": ChatSystem(
        "gemma.jinja", "<bos>", "<eos>", "<pad>", ("<start_of_turn>", "<end_of_turn>")
    ),
    "gemma 3": ChatSystem(
        "gemma3.jinja", "<bos>", "<eos>", "<pad>", ("<start_of_turn>", "<end_of_turn>")
    ),
    "mistral": ChatSystem(_MISTRAL, "<s>", "</s>", "<pad>"),
    "mistral, pad is EOS": ChatSystem(_MISTRAL, "<s>", "</s>", "</s>"),
    "phi 3": ChatSystem("phi3.jinja", "<s>", "<|endoftext|>", "<unk>", _PHI3, _PHI3),
    "phi 3, pad is EOS": ChatSystem(
        "phi3.jinja", "<s>", "<|endoftext|>", "<|endoftext|>", _PHI3, _PHI3
    ),
    "phi 3.5": ChatSystem("phi3_5.jinja", "<s>", "<|endoftext|>", "<unk>", _PHI3, _PHI3),
    "phi 4": ChatSystem(
        _PHI4, None, "<|im_end|>", "<|dummy|>", ("<|im_start|>", "<|im_sep|>", "<|im_end|>")
    ),
    "olmo 2": ChatSystem(
        "{{ bos_token }}" + _TULU, "<|endoftext|>", "<|endoftext|>", "<|pad|>"
    ),
    "tulu 3": ChatSystem(_TULU, "<|begin_of_text|>", "<|end_of_text|>", "<pad>"),
    "command r": ChatSystem(
        "cohere.jinja", "<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>", "<PAD>",
        ("<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>"),
    ),
    "command r7b": ChatSystem(
        "cohere2.jinja", "<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>", "<PAD>",
        ("<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>",
         "<|START_RESPONSE|>", "<|END_RESPONSE|>"),
    ),
    "deepseek 3": ChatSystem(
        "deepseekv3.jinja", "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>",
        ("<｜User｜>", "<｜Assistant｜>"),
    ),
    "internlm 2": ChatSystem(
        "{{ bos_token }}" + CHATML, "<s>", "</s>", "<pad>", ("<|im_start|>", "<|im_end|>")
    ),
    "chatglm": ChatSystem(
        _CHATGLM, None, "<|endoftext|>", "<pad>", ("[gMASK]", "<sop>", "<|user|>", "<|assistant|>")
    ),
    "zephyr": ChatSystem(_ZEPHYR, "<s>", "</s>", "<pad>", ("<|user|>", "<|assistant|>")),
    "zephyr, pad is EOS": ChatSystem(_ZEPHYR, "<s>", "</s>", "</s>"),
}  # fmt: skip


def letters_tokenizer(system: ChatSystem | None = None, **tokens: Any) -> Any:
    """A tokenizer that knows bytes and special tokens, those of a system or the named ones."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    if system is not None:
        tokens = {"bos_token": system.bos, "eos_token": system.eos, "pad_token": system.pad}
    named = [token for token in tokens.values() if token]
    special = list(dict.fromkeys([*named, *(system.more if system else ())]))
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*special, *letters])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    swallowing = system.rstrip if system else ()
    inner.add_special_tokens([AddedToken(t, rstrip=t in swallowing) for t in special])
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    if bos := tokens.get("bos_token"):
        inner.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, vocabulary[bos])]
        )
    made = PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=2048, **tokens)
    if system is not None:
        made.chat_template = system.source()
    return made
