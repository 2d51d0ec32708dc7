"""Makes a small Qwen3-shaped base model: a byte-level BPE tokenizer and fresh weights."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reward_actor.atomic import replacing_directory
from reward_actor.contract import TOKENIZER_FILES
from reward_actor.json_files import json_lines
from reward_actor.transformers_internals import tied_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

PAD_TOKEN = "<|endoftext|>"
TURN_START_TOKEN = "<|im_start|>"
EOS_TOKEN = "<|im_end|>"
SPECIAL_TOKENS = (PAD_TOKEN, TURN_START_TOKEN, EOS_TOKEN)
_FILES = {*TOKENIZER_FILES, "config.json", "generation_config.json", "model.safetensors"}
ROLES = "system\nuser\nassistant\n"
# Byte-level BPE starts from one token per byte, which is why any text can be encoded.
MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)

CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def init_model(
    out_dir: Path | str,
    corpus: Iterable[str] = (),
    *,
    vocab_size: int = 2048,
    hidden_size: int = 128,
    num_layers: int = 2,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 32,
    intermediate_size: int = 384,
    max_position_embeddings: int = 2048,
    tokenizer_from: Path | str | None = None,
    seed: int = 0,
) -> Path:
    """Saves a freshly initialised causal LM with its tokenizer to `out_dir`, and returns that path.

    The tokenizer is trained on `corpus` (at most `vocab_size` tokens; a small corpus yields fewer)
    or, with `tokenizer_from`, is the one saved in that directory. Weights are float32 and equal
    for equal arguments. Raises ValueError for an empty corpus, sizes that do not fit together, a
    tokenizer without chat template or with pad == eos, and an `out_dir` that holds an export or
    other files.
    """
    _check_sizes(vocab_size, num_heads, num_kv_heads, head_dim)
    out_dir = Path(out_dir).resolve()
    if (out_dir / "scoring_contract.json").exists():
        raise ValueError(f"out_dir: {out_dir} holds a trained export; choose another directory")
    others = {path.name for path in out_dir.iterdir()} if out_dir.exists() else set()
    if others - _FILES:
        raise ValueError(f"out_dir: {out_dir} holds other files; choose another directory")

    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config

    if tokenizer_from is None:
        tokenizer = train_tokenizer(corpus, vocab_size, max_position_embeddings)
    else:
        tokenizer = _load_tokenizer(Path(tokenizer_from))
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=intermediate_size,
        max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=True,
        # The usual 0.02 fits a width of 2500; a narrow network starts to learn sooner with more.
        initializer_range=hidden_size**-0.5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):  # the caller's random state stays as it was
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    num_bytes = sum(weight.nbytes for weight in model.state_dict().values())
    with replacing_directory(out_dir, num_bytes) as staging:
        if tokenizer_from is None:
            tokenizer.save_pretrained(staging)
        else:
            copy_tokenizer(Path(tokenizer_from), staging)
        _save(model, staging)
    return out_dir


def _save(model: PreTrainedModel, out_dir: Path) -> None:
    # Not save_pretrained, which shows a progress bar, and imports DeepSpeed where it is installed.
    from safetensors.torch import save_file

    weights = {
        name: weight
        for name, weight in model.state_dict().items()
        if name not in tied_weights(model)
    }
    save_file(weights, out_dir / "model.safetensors", metadata={"format": "pt"})
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(out_dir)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(out_dir)


def train_tokenizer(
    corpus: Iterable[str], vocab_size: int, max_length: int
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with ChatML; encodes and decodes any text without loss.

    `max_length` (tokens) is what the tokenizer reports as the model's. Raises ValueError for an
    empty corpus.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    texts = (text for text in corpus if text.strip())
    first = next(texts, None)
    if first is None:
        raise ValueError("corpus: it holds no text; give the files to train the tokenizer on")
    tokenizer = Tokenizer(models.BPE())
    # No normaliser: NFC would make some texts come back changed.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        # Every turn of a chat begins with a role, so each role deserves a token of its own.
        (part for text in chain([first], texts) for part in (ROLES, text)),
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            show_progress=False,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD_TOKEN,
        eos_token=EOS_TOKEN,
        additional_special_tokens=[TURN_START_TOKEN],
        clean_up_tokenization_spaces=False,
        padding_side="right",
        model_max_length=max_length,
        chat_template=CHAT_TEMPLATE,
    )


def texts_from_file(path: Path | str) -> Iterator[str]:
    """Strings of a .jsonl, .jsonl.gz or .txt file.

    A row of JSON gives every string at any depth; a .txt file gives its lines that are not blank.
    Raises ValueError, naming the file, for one that is missing, of another type or not JSON, and at
    its end for one without text.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(
            f"corpus: {path} is not a file; give an existing .jsonl, .jsonl.gz or .txt"
        )
    if not path.name.endswith((".jsonl", ".jsonl.gz", ".txt")):
        raise ValueError(f"corpus: {path} must end in .jsonl, .jsonl.gz or .txt")
    return _texts(path)


def _texts(path: Path) -> Iterator[str]:
    text = None
    try:
        for row in _lines(path) if path.suffix == ".txt" else (row for _, row in json_lines(path)):
            for text in texts_of(row):
                yield text
    except ValueError as error:
        raise ValueError(f"corpus: {error}") from error
    if text is None:
        raise ValueError(f"corpus: {path} holds no text; give a file with some")


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8", newline="\n") as file:
            for line in file:
                yield line.rstrip("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as UTF-8 text: {error}") from error


def texts_of(value: Any) -> Iterator[str]:
    """Every string that is not blank, at any depth; of a chat message only its content."""
    if isinstance(value, str):
        if value.strip():
            yield value
    elif isinstance(value, list):
        for item in value:
            yield from texts_of(item)
    elif isinstance(value, dict):
        # A chat message: "user" and "assistant" are not words of the corpus.
        is_message = "role" in value and "content" in value
        yield from texts_of(value["content"] if is_message else list(value.values()))


def _check_sizes(vocab_size: int, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(f"vocab_size: {vocab_size} is below {MIN_VOCAB_SIZE} (bytes and specials)")
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(f"num_heads: {num_heads} is not a multiple of num_kv_heads {num_kv_heads}")
    if head_dim % 2:
        raise ValueError(f"head_dim: {head_dim} must be even (rotary embedding)")


def _load_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    if not path.is_dir():
        raise ValueError(
            f"tokenizer_from: {path} is not a directory; run `rayward init-model` first"
        )

    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    tokenizer = AutoTokenizer.from_pretrained(path)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"tokenizer_from: {path} holds no fast tokenizer (tokenizer.json)")
    if tokenizer.chat_template is None:
        raise ValueError(f"tokenizer_from: {path} has no chat template")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise ValueError(f"tokenizer_from: {path} needs a pad token that is not its eos token")
    return tokenizer


def copy_tokenizer(source: Path, out_dir: Path) -> None:
    """Copy a tokenizer's files byte for byte: loading and saving it would add keys to them."""
    out_dir.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if (source / name).is_file() and source.resolve() != out_dir.resolve():
            shutil.copyfile(source / name, out_dir / name)
