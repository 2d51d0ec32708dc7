"""The contract of a model that has none: of a new one, from its tokenizer and its network's
configuration, and of another system's directory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import date
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from jinja2 import TemplateError
from transformers import AutoConfig

from reward_actor.contract import ScoringContract, check_template_args
from reward_actor.model.directory import CheckpointError as CheckpointError
from reward_actor.model.ends import Inferred, system_of, turn_end_of, with_ends
from reward_actor.model.layouts import Layout
from reward_actor.model.rope import LengthClasses
from reward_actor.model.tokenizer import chat_template_of
from reward_actor.prompts import OF_A_TEMPLATE, clock
from reward_actor.render import SENTINEL

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerFast


def contract_for(
    tokenizer: PreTrainedTokenizerFast,
    config: PretrainedConfig,
    *,
    format: str,
    max_length: int | None = None,
    append_eos: bool | None = None,
    plain_content: bool = True,
    template_args: Mapping[str, Any] | None = None,
    dtype: str = "float32",
) -> ScoringContract:
    """A contract, without golden samples, for a tokenizer and a network.

    `max_length` defaults to what network and tokenizer both allow. `append_eos` defaults to True
    under "text" where the tokenizer has an EOS. Raises ValueError where the tokenizer has no chat
    template and `format` is "chat", or has no token that could pad, and for `template_args` that no
    template may be given.
    """
    if format == "chat" and not tokenizer.chat_template:
        raise ValueError(
            "format is 'chat' but the tokenizer has no chat template; add chat_template.jinja to "
            "the model's directory or use format 'text'"
        )
    limit = longest_of(tokenizer, config)
    if max_length is not None and max_length > limit:
        raise ValueError(f"max_length is {max_length}, but the model's positions end at {limit}")
    eos = tokenizer.eos_token_id
    template = chat_template_of(tokenizer) if format == "chat" else None
    vocab_size = config.get_text_config().vocab_size
    today = date.today().isoformat()
    given = dict(template_args or {})
    check_template_args(given)
    turn_end = turn_end_of(tokenizer, _suffix(tokenizer, template, given)) if template else ""
    return ScoringContract(
        format=cast('Literal["chat", "text"]', format),
        chat_template=template,
        template_date=today if template and "strftime_now" in template else None,
        template_args=given,
        turn_end=turn_end,
        add_special_tokens=format == "text",
        append_eos=format == "text" and eos is not None if append_eos is None else append_eos,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=eos,
        pad_token_id=_pad_token_id(tokenizer, turn_end, vocab_size),
        max_length=max_length or limit,
        vocab_size=vocab_size,
        plain_content=plain_content and format == "chat",
        parse_arguments=format == "chat",
        dtype=dtype,
    )


def longest_of(tokenizer: PreTrainedTokenizerFast, config: PretrainedConfig) -> int:
    """Tokens that both network and tokenizer allow in a sequence."""
    limits = [
        getattr(config.get_text_config(), "max_position_embeddings", None),
        LengthClasses(config).longest,
        tokenizer.model_max_length,
    ]
    return int(min([n for n in limits if n and n < 1e9], default=2048))


def _pad_token_id(tokenizer: PreTrainedTokenizerFast, turn_end: str, vocab_size: int) -> int:
    """A token to pad with that never ends a sequence and that the network has an embedding for.

    Ours pools by length, but plain `transformers` pools at the last token that is not this one:
    with pad == EOS it would read the token before.
    """
    ends = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(turn_end or "")}
    candidates = [tokenizer.pad_token_id, tokenizer.unk_token_id]
    candidates += [i for i, t in tokenizer.added_tokens_decoder.items() if t.special]
    # The byte 0, as byte-level BPE and SentencePiece write it: no text ends with it, either.
    candidates += [tokenizer.get_vocab().get(name) for name in ("\u0100", "<0x00>")]
    fitting = [i for i in candidates if i is not None and i not in ends and i < vocab_size]
    if not fitting:
        raise ValueError(
            "the tokenizer has no token to pad with that differs from those that end a text; add "
            'one: tokenizer.add_special_tokens({"pad_token": "<|pad|>"})'
        )
    return int(fitting[0])


def _suffix(
    tokenizer: PreTrainedTokenizerFast, template: str, template_args: Mapping[str, Any]
) -> str:
    """What the template writes after the last completion."""
    try:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": "x"}, {"role": "assistant", "content": SENTINEL}],
            chat_template=template,
            tokenize=False,
            **clock("2000-01-01"),
            **template_args,
        )
    except (TemplateError, *OF_A_TEMPLATE) as error:
        raise ValueError(f"the chat template cannot be used: {error}") from error
    assert isinstance(text, str)
    if SENTINEL not in text:
        raise ValueError("the chat template does not write the completion that it is given")
    return text.rpartition(SENTINEL)[2]


def infer_contract(
    layout: Layout,
    tokenizer: PreTrainedTokenizerFast,
    format: str | None = None,
    *,
    ends_with: str | None = None,
    append_eos: bool | None = None,
    template_args: Mapping[str, Any] | None = None,
) -> Inferred:
    """The contract of a foreign directory, under the rules of the system that wrote it.

    `format` is "chat" by default where the tokenizer has a chat template. `ends_with` is what a
    sequence ends with after its completion ("none": nothing), and `append_eos` whether EOS comes
    behind that, where the caller knows better. `template_args` are the contract's. The caller has
    checked that the model's own code may run.
    """
    config = AutoConfig.from_pretrained(layout.base, trust_remote_code=layout.kind == "remote_code")
    if layout.vocab_size is not None:
        config.get_text_config().vocab_size = layout.vocab_size
    mean, std = layout.normalisation
    system = system_of(layout)
    base = contract_for(
        tokenizer,
        config,
        format=format or ("chat" if tokenizer.chat_template else "text"),
        append_eos=False,
        template_args=template_args,
        dtype=str(config.dtype or torch.float32).removeprefix("torch."),
    )
    # OpenRLHF lets the tokenizer add nothing (reward_dataset.py).
    add_special_tokens = base.add_special_tokens and system != "OpenRLHF"
    base = replace(base, mean=mean, std=std, add_special_tokens=add_special_tokens)
    template = base.chat_template
    suffix = _suffix(tokenizer, template, base.template_args) if template else ""
    return with_ends(base, layout, system, tokenizer, suffix, ends_with, append_eos)
