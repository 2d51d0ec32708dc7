"""The tokenizer of a reward model's directory. Importing this loads neither torch nor a model.

`AutoTokenizer` alone takes three seconds to import, and with it comes torch: too much for a process
that only renders. `load_like` gives such a process the same tokenizer for a tenth of that.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, cast

from reward_actor.contract import ScoringContract, sha256_text
from reward_actor.model.directory import CheckpointError
from reward_actor.model.layouts import tokenizer_directory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from reward_actor.prompts import PromptFormat


def load_tokenizer(path: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerFast:
    """The fast tokenizer of a directory. Raises CheckpointError without one."""
    from transformers import AutoTokenizer

    directory = tokenizer_directory(path)
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
    if not tokenizer.is_fast:
        raise CheckpointError(f"{path} has no fast tokenizer (tokenizer.json)")
    return cast("PreTrainedTokenizerFast", tokenizer)


def chat_template_of(tokenizer: PreTrainedTokenizerFast) -> str | None:
    """The chat template that a tokenizer uses by itself. Raises ValueError if it only has others,
    with names."""
    template: str | dict[str, str] | None = tokenizer.chat_template
    if isinstance(template, dict):
        if "default" not in template:
            names = ", ".join(sorted(template))
            raise ValueError(
                f"the tokenizer has only chat templates with names ({names}); write the one of its "
                "training into the model's directory as chat_template.jinja"
            )
        return template["default"]
    return template


def tokenizer_fingerprint(
    tokenizer: PreTrainedTokenizerFast, format: ScoringContract | PromptFormat | None = None
) -> str:
    """Equal fingerprints turn equal messages into equal ids: vocabulary, rules, chat template.

    With a contract, or a prompt's format, its template counts, otherwise the tokenizer's own.
    """
    template = tokenizer.chat_template if format is None else format.chat_template
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    for setting in ("padding", "truncation"):  # settings of a call, not of the vocabulary
        rules.pop(setting, None)
    return sha256_text(json.dumps([rules, template], sort_keys=True))


def identity(tokenizer: PreTrainedTokenizerFast) -> str:
    """Equal for tokenizers that turn equal text, and messages under equal templates, into equal
    ids: the fingerprint and the special tokens that a template may write."""
    named = sorted((k, str(v)) for k, v in tokenizer.special_tokens_map.items())
    return f"{tokenizer_fingerprint(tokenizer)} {named}"


def load_like(
    path: Path, expected: str, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerFast:
    """The tokenizer of a directory whose `identity` another process has found to be `expected`.

    Reads tokenizer.json alone, and goes the whole way of `load_tokenizer` only where that gives
    another tokenizer: some classes change what the file says.
    """
    from transformers import PreTrainedTokenizerFast

    directory = tokenizer_directory(path)
    if (directory / "tokenizer.json").exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
        if identity(tokenizer) == expected:
            return cast("PreTrainedTokenizerFast", tokenizer)
    return load_tokenizer(path, trust_remote_code=trust_remote_code)
