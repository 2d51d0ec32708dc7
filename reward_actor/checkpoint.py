"""Reward-model directories: load them, save ours. safetensors only; nothing here reads pickle."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)

from reward_actor.contract import (
    CONTRACT_FILE,
    ScoringContract,
    digests,
    model_version,
    sha256_file,
    weight_files,
)
from reward_actor.extract import HEAD_NAMES, RewardModel
from reward_actor.render import contract_for

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MANIFEST_FILE = "MANIFEST.json"


class CheckpointError(ValueError):
    """This directory cannot be served; the message says what to do."""


@dataclass(frozen=True)
class LoadedModel:
    """One immutable reward function: all that a batch needs to be scored under one version."""

    version: str
    model: RewardModel
    tokenizer: PreTrainedTokenizerFast
    contract: ScoringContract
    dtype: str
    path: Path


def load_tokenizer(path: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerFast:
    """The fast tokenizer of a directory. Raises CheckpointError without one."""
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    if not tokenizer.is_fast:
        raise CheckpointError(f"{path} has no fast tokenizer (tokenizer.json)")
    return cast("PreTrainedTokenizerFast", tokenizer)


def load_contract(path: Path, *, trust_remote_code: bool = False) -> ScoringContract:
    """The directory's contract, or one inferred from its tokenizer with a warning."""
    contract = ScoringContract.load(path)
    if contract is not None:
        return contract
    tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    format_ = "chat" if tokenizer.chat_template else "text"
    warnings.warn(
        f"{path} has no scoring_contract.json; inferred format {format_!r} from its tokenizer. "
        "Nothing proves that these rewards are the ones of its training.",
        stacklevel=2,
    )
    dtype = str(config.dtype or torch.float32).removeprefix("torch.")
    # Whoever made a foreign directory decided about EOS without us; its text is scored as it comes.
    return contract_for(tokenizer, config, format=format_, append_eos=False, dtype=dtype)


def load(
    path: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Load a reward model for scoring: evaluation mode, no gradients.

    Raises CheckpointError for a missing directory, a causal model without a trained head, pickled
    weights, weights that do not fit the network or that differ from the manifest; ContractError
    for a damaged contract.
    """
    directory = check_directory(path)
    tokenizer = load_tokenizer(directory, trust_remote_code=trust_remote_code)
    contract = load_contract(directory, trust_remote_code=trust_remote_code)
    check_manifest(directory)
    dtype = contract.dtype if dtype == "auto" else dtype
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype is {dtype!r}; it must be auto, float32, bfloat16 or float16")
    network, report = AutoModelForSequenceClassification.from_pretrained(
        directory,
        dtype=getattr(torch, dtype),
        use_safetensors=True,
        trust_remote_code=trust_remote_code,
        output_loading_info=True,
    )
    absent = sorted(report["missing_keys"]) + sorted(str(k) for k in report["mismatched_keys"])
    if absent:
        raise CheckpointError(
            f"{directory} does not hold the weights of its own config.json: {absent[0]} "
            f"({len(absent)} in all) is missing or has another shape"
        )
    try:
        model = RewardModel(network).to(resolve_device(device)).eval().requires_grad_(False)
    except ValueError as error:
        raise CheckpointError(f"{directory}: {error}") from error
    if not (directory / CONTRACT_FILE).exists():
        _check_pooling(model, directory)
    version = model_version(digests(directory), contract, dtype)
    return LoadedModel(version, model, tokenizer, contract, dtype, directory)


def _check_pooling(model: RewardModel, directory: Path) -> None:
    """Raise CheckpointError unless a foreign network itself scores a row as we do.

    An encoder with a pooler of its own, or one that attends to what follows (our padding), would
    otherwise get numbers that mean nothing.
    """
    device = next(model.parameters()).device
    pad = model.network.config.pad_token_id  # where plain transformers would stop reading
    row = torch.tensor([[i for i in range(5, 14) if i != pad]], device=device)
    padded = torch.cat([row, torch.zeros_like(row)], dim=1)
    length = torch.tensor([row.shape[1]], device=device)
    with torch.inference_mode():
        ours = model(padded, length).item()
        own = model.network(input_ids=row).logits.float().item()
    if not abs(ours - own) <= 2e-2 * max(1.0, abs(own)):
        raise CheckpointError(
            f"{directory}: {type(model.network).__name__} scores {own:.4g} where its head at the "
            f"last token says {ours:.4g}; it pools or attends in another way than this version "
            "knows"
        )


def resolve_device(device: str) -> str:
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_directory(path: str | Path) -> Path:
    """The directory as a path. Raises CheckpointError unless it holds a trained reward model."""
    directory = Path(path).expanduser()
    if not directory.is_dir():
        raise CheckpointError(
            f"{directory} is not a directory; give the export of a training (its export/ folder)"
        )
    config_file = directory / "config.json"
    if not config_file.exists():
        hint = "; did you mean its export/ folder?" if (directory / "export").is_dir() else ""
        raise CheckpointError(f"{directory} holds no config.json, so no model{hint}")
    names = _weight_names(directory)
    if not names:
        pickled = sorted(directory.glob("*.bin")) + sorted(directory.glob("*.pt"))
        raise CheckpointError(
            f"{directory} holds no .safetensors weights"
            + (
                f" ({pickled[0].name} is a pickle, which can run code when it is read; save the "
                "model with safe_serialization=True)"
                if pickled
                else ""
            )
        )
    if not any(name.split(".")[-2:-1] and name.split(".")[-2] in HEAD_NAMES for name in names):
        architecture = json.loads(config_file.read_text()).get("architectures") or ["a network"]
        raise CheckpointError(
            f"{directory} has no trained reward head: {architecture[0]} without any of "
            f"{', '.join(h + '.weight' for h in HEAD_NAMES)}. Serving it would score with random "
            "numbers. Train it first: rayward train --model.path " + str(directory)
        )
    return directory


def _weight_names(directory: Path) -> set[str]:
    names: set[str] = set()
    for path in weight_files(directory):
        try:
            with safe_open(path, framework="np") as file:
                names.update(file.keys())
        except Exception as error:  # safetensors' own error type is not exported everywhere
            raise CheckpointError(f"{path} is damaged: {error}") from error
    return names


def check_manifest(directory: Path) -> None:
    """Raise CheckpointError if a file differs from the digest that the export recorded."""
    path = directory / MANIFEST_FILE
    if not path.exists():
        return
    for name, expected in json.loads(path.read_text())["sha256"].items():
        file = directory / name
        if not file.exists():
            raise CheckpointError(f"{file} is in {MANIFEST_FILE} but not in the directory")
        if sha256_file(file) != expected:
            raise CheckpointError(
                f"{file} differs from its digest in {MANIFEST_FILE}: it was damaged or edited "
                "after the export. Copy or export it again."
            )


def export(
    directory: Path,
    config: PretrainedConfig,
    network: PreTrainedModel,
    state_dict: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerFast,
    contract: ScoringContract,
    files: Mapping[str, str | Path],
    device: str = "auto",
) -> ScoringContract:
    """Write a directory that Rayward, plain `transformers` and vLLM load, and replace `directory`.

    `state_dict` are the whole weights as they were computed with; `files` are more files, by name:
    their text, or a path to copy. Everything is written beside `directory` first and checked by
    its golden samples, so an interrupted export leaves what was there before.
    """
    from reward_actor.golden import record

    staging = directory.with_name(directory.name + ".partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    config.num_labels = 1
    config.id2label = {0: "reward"}
    config.label2id = {"reward": 0}
    config.problem_type = "regression"  # without it vLLM puts a sigmoid on the reward
    config.pad_token_id = contract.pad_token_id
    config.use_cache = True
    network.config = config
    network.save_pretrained(staging, state_dict=dict(state_dict))
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(contract.pad_token_id)
    tokenizer.save_pretrained(staging)
    contract = record(staging, contract, device)
    for name, content in files.items():
        if isinstance(content, Path):
            shutil.copyfile(content, staging / name)
        else:
            (staging / name).write_text(content, encoding="utf-8")
    write_manifest(staging)
    previous = directory.with_name(directory.name + ".previous")
    shutil.rmtree(previous, ignore_errors=True)
    if directory.exists():
        os.replace(directory, previous)
    os.replace(staging, directory)
    shutil.rmtree(previous, ignore_errors=True)
    return contract


def write_manifest(directory: Path) -> None:
    """Record the sha256 of every file of the directory in MANIFEST.json."""
    files: dict[str, Any] = {
        str(path.relative_to(directory)): sha256_file(path)
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != MANIFEST_FILE
    }
    text = json.dumps({"sha256": files}, indent=2)
    (directory / MANIFEST_FILE).write_text(text + "\n", encoding="utf-8")
