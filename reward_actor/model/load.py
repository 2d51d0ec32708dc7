"""Opens a reward model's directory. safetensors only; nothing here reads pickle."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from reward_actor.contract import CONTRACT_FILE, ScoringContract, model_version
from reward_actor.model.inferred import infer_contract
from reward_actor.model.layouts import CheckpointError as CheckpointError
from reward_actor.model.layouts import Layout, recognise
from reward_actor.model.manifest import check_manifest
from reward_actor.model.reward_model import RewardModel
from reward_actor.model.tokenizer import load_tokenizer
from reward_actor.model.weights import load_network, own_score

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


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


def load(
    path: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Load a reward model for scoring: evaluation mode, no gradients.

    Any layout of `reward_actor.model.layouts`. Raises CheckpointError and ContractError as
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
