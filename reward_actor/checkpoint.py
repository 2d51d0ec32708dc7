"""Reward-model directories: load them, save ours. safetensors only; nothing here reads pickle."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from reward_actor.contract import CONTRACT_FILE, ScoringContract, model_version, sha256_file
from reward_actor.extract import RewardModel
from reward_actor.headers import CheckpointError as CheckpointError
from reward_actor.layouts import Layout, recognise
from reward_actor.networks import load_network, own_score
from reward_actor.new_contract import contract_for
from reward_actor.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MANIFEST_FILE = "MANIFEST.json"

# vLLM finds a network by the name of its class, and some families by another than `transformers`
# gives; `transformers` goes by model_type, so that either name serves it.
_VLLM_NAMES = {"Gemma3TextForSequenceClassification": "Gemma3ForSequenceClassification"}


@dataclass(frozen=True)
class LoadedModel:
    """One immutable reward function: all that a batch needs to be scored under one version."""

    version: str
    model: RewardModel
    tokenizer: PreTrainedTokenizerFast
    contract: ScoringContract
    dtype: str
    path: Path


@dataclass(frozen=True)
class Opened:
    """All of a reward model's directory but its network, checked; dtype is the one in effect."""

    layout: Layout
    tokenizer: PreTrainedTokenizerFast
    contract: ScoringContract
    dtype: str

    def version(self) -> str:
        """The model_version, whatever runs the network. Reads all weights."""
        return model_version(self.layout.digests(), self.contract, self.dtype)


def load_contract(path: Path, *, trust_remote_code: bool = False) -> ScoringContract:
    """The directory's contract, or one inferred from its tokenizer with a warning."""
    contract = ScoringContract.load(path)
    if contract is not None:
        return contract
    layout = recognise(path)
    layout.require_trust(trust_remote_code)
    tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
    contract = infer_contract(layout, tokenizer)
    warnings.warn(
        f"{path} has no scoring_contract.json; inferred format {contract.format!r} from its "
        "tokenizer. Nothing proves that these rewards are the ones of its training.",
        stacklevel=2,
    )
    return contract


def infer_contract(
    layout: Layout, tokenizer: PreTrainedTokenizerFast, format: str | None = None
) -> ScoringContract:
    """The contract of a foreign directory, under the rules of the system that wrote it.

    `format` is "chat" by default where the tokenizer has a chat template. The caller has checked
    that the model's own code may run.
    """
    config = AutoConfig.from_pretrained(layout.base, trust_remote_code=layout.kind == "remote_code")
    mean, std = layout.normalisation
    # OpenRLHF ends every text with EOS and lets the tokenizer add nothing (reward_dataset.py).
    # Whoever made another directory decided about EOS without us; its text is scored as it comes.
    openrlhf = layout.kind == "openrlhf"
    contract = contract_for(
        tokenizer,
        config,
        format=format or ("chat" if tokenizer.chat_template else "text"),
        append_eos=openrlhf,
        dtype=str(config.dtype or torch.float32).removeprefix("torch."),
    )
    add_special_tokens = contract.add_special_tokens and not openrlhf
    return replace(contract, mean=mean, std=std, add_special_tokens=add_special_tokens)


def load(
    path: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Load a reward model for scoring: evaluation mode, no gradients.

    Any layout of `reward_actor.layouts`. Raises CheckpointError and ContractError as
    `open_directory` does, and CheckpointError for weights that do not fit the network.
    """
    opened = open_directory(path, dtype=dtype, trust_remote_code=trust_remote_code)
    layout, directory = opened.layout, opened.layout.directory
    network = load_network(
        layout, getattr(torch, opened.dtype), trust_remote_code=trust_remote_code
    )
    try:
        model = RewardModel(network).to(resolve_device(device)).eval().requires_grad_(False)
    except ValueError as error:
        raise CheckpointError(f"{directory}: {error}") from error
    if not (directory / CONTRACT_FILE).exists():
        _check_pooling(model, directory)
    return LoadedModel(
        opened.version(), model, opened.tokenizer, opened.contract, opened.dtype, directory
    )


def open_directory(
    path: str | Path, *, dtype: str = "auto", trust_remote_code: bool = False
) -> Opened:
    """What a reward model is, before any engine loads its network.

    Raises CheckpointError for a missing directory, a causal model without a trained head, pickled
    weights, code of the model's own without `trust_remote_code`, a head that the contract does not
    name, and files that differ from the manifest; ContractError for a damaged contract.
    """
    layout = recognise(path)
    layout.require_trust(trust_remote_code)
    directory = layout.directory
    tokenizer = load_tokenizer(directory, trust_remote_code=trust_remote_code)
    contract = load_contract(directory, trust_remote_code=trust_remote_code)
    if layout.num_outputs != len(contract.heads):
        raise CheckpointError(
            f"{directory}: the head has {layout.num_outputs} outputs but the contract names "
            f"{len(contract.heads)} ({', '.join(contract.heads)}); name every output in its heads"
        )
    check_manifest(directory)
    dtype = contract.dtype if dtype == "auto" else dtype
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype is {dtype!r}; it must be auto, float32, bfloat16 or float16")
    return Opened(layout, tokenizer, contract, dtype)


def _check_pooling(model: RewardModel, directory: Path) -> None:
    """Raise CheckpointError unless a foreign network itself scores a row as we do.

    An encoder with a pooler of its own, or one that attends to what follows (our padding), would
    otherwise get numbers that mean nothing.
    """
    device = next(model.parameters()).device
    pad = model.network.config.pad_token_id  # where plain transformers would stop reading
    vocab_size = model.network.config.get_text_config().vocab_size
    ids = [i for i in (n % vocab_size for n in range(5, 14)) if i != pad] or [0]
    row = torch.tensor([ids], device=device)
    padded = torch.cat([row, torch.zeros_like(row)], dim=1)
    length = torch.tensor([row.shape[1]], device=device)
    with torch.inference_mode():
        ours = model(padded, length).item()
    own = own_score(model.network, ids)
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
    return recognise(path).directory


def check_manifest(directory: Path) -> None:
    """Raise CheckpointError if a file differs from the digest that the export recorded.

    Files about the model, which decide no reward, may be left out of a copy.
    """
    path = directory / MANIFEST_FILE
    if not path.exists():
        return
    manifest = json.loads(path.read_text())
    for name, expected in manifest["sha256"].items():
        file = directory / name
        if not file.exists():
            if name in manifest.get("optional", []):
                continue
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

    `state_dict` are the whole weights as they were computed with; `files` are files about the
    model, by name: their text, or a path to copy. Everything is written beside `directory` first
    and checked by its golden samples, so an interrupted export leaves what was there before.
    """
    from reward_actor.golden import record

    staging = directory.with_name(directory.name + ".partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    config.num_labels = len(contract.heads)
    config.id2label = dict(enumerate(contract.heads))
    config.label2id = {name: index for index, name in enumerate(contract.heads)}
    config.problem_type = "regression"  # without it vLLM puts a sigmoid on the reward
    config.pad_token_id = contract.pad_token_id
    config.use_cache = True
    network.config = config
    network.save_pretrained(staging, state_dict=dict(state_dict))
    _name_for_vllm(staging / "config.json")
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(contract.pad_token_id)
    tokenizer.save_pretrained(staging)
    contract = record(staging, contract, device)
    for name, content in files.items():
        (staging / name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Path):
            shutil.copyfile(content, staging / name)
        else:
            (staging / name).write_text(content, encoding="utf-8")
    write_manifest(staging, optional=files)
    previous = directory.with_name(directory.name + ".previous")
    shutil.rmtree(previous, ignore_errors=True)
    if directory.exists():
        os.replace(directory, previous)
    os.replace(staging, directory)
    shutil.rmtree(previous, ignore_errors=True)
    return contract


def _name_for_vllm(config_file: Path) -> None:
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config["architectures"] = [_VLLM_NAMES.get(name, name) for name in config["architectures"]]
    config_file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write_manifest(directory: Path, optional: Iterable[str] = ()) -> None:
    """Record the sha256 of every file of the directory in MANIFEST.json, and which of them a copy
    may lack."""
    files: dict[str, Any] = {
        str(path.relative_to(directory)): sha256_file(path)
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != MANIFEST_FILE
    }
    text = json.dumps({"sha256": files, "optional": sorted(optional)}, indent=2)
    (directory / MANIFEST_FILE).write_text(text + "\n", encoding="utf-8")
