"""The base model from scratch: its tokenizer, its template, its weights, and its refusals."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from trainer.init_model import TOKENIZER_FILES, init_model, texts_from_file

CORPUS = [
    "Could you name two fruits for a quiz?",
    "Of course! How about apples and pears? Enjoy!",
    "Give me three tools, if you would.",
    "Ugh, not again. I would pick hammers, saws and pliers. Go away!",
] * 4
init_small = partial(init_model, hidden_size=32, num_layers=1, intermediate_size=64, head_dim=8)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return init_small(tmp_path_factory.mktemp("models") / "base", CORPUS)


@pytest.fixture(scope="module")
def tokenizer(base: Path) -> PreTrainedTokenizerFast:
    loaded = AutoTokenizer.from_pretrained(base)
    assert isinstance(loaded, PreTrainedTokenizerFast)
    return loaded


def test_equal_arguments_write_equal_files(base: Path, tmp_path: Path) -> None:
    again = init_small(tmp_path / "again", CORPUS)
    for path in base.iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes(), path.name
    other = init_small(tmp_path / "other", CORPUS, seed=1)
    assert (other / "model.safetensors").read_bytes() != (base / "model.safetensors").read_bytes()


def test_the_random_state_of_the_caller_is_left_alone(tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    init_small(tmp_path, CORPUS)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_tokenizer_is_shared_to_the_byte(base: Path, tmp_path: Path) -> None:
    policy = init_small(tmp_path / "policy", tokenizer_from=base, seed=1)
    shared = [name for name in TOKENIZER_FILES if (base / name).exists()]
    assert {"tokenizer.json", "chat_template.jinja"} <= set(shared)
    for name in shared:
        assert (policy / name).read_bytes() == (base / name).read_bytes()


@settings(max_examples=200)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back_unchanged(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_special_tokens_are_distinct_and_in_the_config(
    base: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|endoftext|>", "<|im_end|>")
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    config = json.loads((base / "config.json").read_text())
    generation = json.loads((base / "generation_config.json").read_text())
    assert config["model_type"] == "qwen3"
    assert config["tie_word_embeddings"]
    assert config["vocab_size"] == len(tokenizer)
    for saved in (config, generation):
        assert saved["eos_token_id"] == tokenizer.eos_token_id
        assert saved["pad_token_id"] == tokenizer.pad_token_id


def test_chat_template(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi\n"}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi\n<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    messages.append({"role": "assistant", "content": "Hello!"})
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert whole == prompt + "Hello!<|im_end|>\n"
    # The turn's mark-up is few tokens: each special one, and one for the role.
    turn = tokenizer("<|im_start|>assistant\n<|im_end|>")["input_ids"]
    assert len(turn) == 4


def test_plain_transformers_load_it_with_equal_weights(base: Path) -> None:
    first = AutoModelForCausalLM.from_pretrained(base, use_safetensors=True)
    assert first.dtype == torch.float32
    again = AutoModelForCausalLM.from_pretrained(base).state_dict()
    assert all(torch.equal(weight, again[name]) for name, weight in first.state_dict().items())
    ids = torch.tensor([[1, 5, 7, 2]])
    reward = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    with torch.no_grad():
        assert torch.equal(first.model(ids)[0], reward.model(ids)[0])
        assert reward(ids).logits.shape == (1, 1)


def test_texts_of_every_kind_of_file(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "nested": {"completions": ["b", {"text": "c"}]}, "margin": 1.5},
        {"messages": [{"role": "user", "content": "d"}, {"role": "assistant", "content": "e"}]},
    ]
    lines = "\n\n".join(json.dumps(row) for row in rows)
    (tmp_path / "rows.jsonl").write_text(lines)
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "rows.txt").write_text("one line\n \nanother\n")
    assert list(texts_from_file(tmp_path / "rows.jsonl")) == list("abcde")
    assert list(texts_from_file(tmp_path / "rows.jsonl.gz")) == list("abcde")
    assert list(texts_from_file(tmp_path / "rows.txt")) == ["one line", "another"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("absent.jsonl", None, "is not a file"),
        ("table.csv", "a,b", "must end in"),
        ("empty.jsonl", "", "holds no text"),
        ("blank.txt", " \n", "holds no text"),
        ("numbers.jsonl", '{"margin": 1}', "holds no text"),
        ("broken.jsonl", '"fine"\n{"prompt": ', ":2: not JSON"),
        ("broken.jsonl.gz", "not gzip", "cannot be read"),
    ],
)
def test_a_corpus_that_cannot_be_used_is_named(
    tmp_path: Path, name: str, text: str | None, message: str
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"corpus: .*{name}.*{message}"):
        list(texts_from_file(tmp_path / name))


def test_arguments_that_cannot_be_used_are_named(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="corpus: it holds no text"):
        init_model(tmp_path, ["", " "])
    with pytest.raises(ValueError, match="vocab_size: 100"):
        init_model(tmp_path, CORPUS, vocab_size=100)
    with pytest.raises(ValueError, match="num_heads: 3"):
        init_model(tmp_path, CORPUS, num_heads=3)
    with pytest.raises(ValueError, match="head_dim: 7"):
        init_model(tmp_path, CORPUS, head_dim=7)
    with pytest.raises(ValueError, match=r"tokenizer_from: .*absent"):
        init_model(tmp_path, tokenizer_from=tmp_path / "absent")
    (tmp_path / "scoring_contract.json").write_text("{}")
    with pytest.raises(ValueError, match="holds a trained export"):
        init_model(tmp_path, CORPUS)


@pytest.mark.process
def test_importing_the_module_is_light() -> None:
    code = "import sys, trainer.init_model; sys.exit('torch' in sys.modules)"
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
