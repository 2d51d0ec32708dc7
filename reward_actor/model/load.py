"""Opens a reward model's directory. safetensors only; nothing here reads pickle."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from reward_actor.contract import ScoringContract, model_version
from reward_actor.devices import resolve_device
from reward_actor.model.directory import CheckpointError as CheckpointError
from reward_actor.model.ends import Inferred
from reward_actor.model.inferred import infer_contract
from reward_actor.model.layouts import Layout, recognise
from reward_actor.model.manifest import check_manifest
from reward_actor.model.reward_model import RewardModel
from reward_actor.model.tokenizer import load_tokenizer
from reward_actor.model.weights import load_network, own_scores

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
    inferred: Inferred | None = None  # where the directory has no contract


@dataclass(frozen=True)
class Opened:
    """All of a reward model's directory but its network, checked; dtype is the one in effect."""

    layout: Layout
    tokenizer: PreTrainedTokenizerFast
    contract: ScoringContract
    dtype: str
    inferred: Inferred | None = None

    def version(self) -> str:
        """The model_version, whatever runs the network. Reads all weights."""
        return model_version(self.layout.digests(), self.contract, self.dtype)


def load_contract(path: Path, *, trust_remote_code: bool = False) -> ScoringContract:
    """The directory's contract, or one inferred from what it holds, with a warning."""
    contract = ScoringContract.load(path)
    if contract is not None:
        return contract
    layout = recognise(path)
    layout.require_trust(trust_remote_code)
    return _inferred(layout, load_tokenizer(path, trust_remote_code=trust_remote_code)).contract


def _inferred(layout: Layout, tokenizer: PreTrainedTokenizerFast) -> Inferred:
    inferred = infer_contract(layout, tokenizer)
    contract, directory = inferred.contract, layout.directory
    doubt = f" Not settled by its files: {inferred.doubt}." if inferred.doubt else ""
    warnings.warn(
        f"{directory} has no scoring_contract.json; inferred format {contract.format!r} from its "
        f"tokenizer.{doubt} Nothing proves that these rewards are the ones of its training.",
        stacklevel=3,
    )
    if contract.template_date is not None:
        warnings.warn(
            f"the chat template of {directory} writes today's date, so its rewards change with "
            f"the day. Fix the date: rayward convert {directory} DST",
            stacklevel=3,
        )
    return inferred


def load(
    path: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Load a reward model for scoring: evaluation mode, no gradients.

    Any layout of `reward_actor.model.layouts`. Raises CheckpointError and ContractError as
    `open_directory` does, ValueError for a device that is not there, and CheckpointError for
    weights that do not fit the network.
    """
    device = resolve_device(device)
    opened = open_directory(path, dtype=dtype, trust_remote_code=trust_remote_code)
    layout, directory = opened.layout, opened.layout.directory
    network = load_network(
        layout, getattr(torch, opened.dtype), trust_remote_code=trust_remote_code
    )
    try:
        model = RewardModel(network).to(device).eval().requires_grad_(False)
    except ValueError as error:
        raise CheckpointError(f"{directory}: {error}") from error
    if not opened.contract.golden.samples:
        _check_pooling(model, directory)
    return LoadedModel(
        opened.version(),
        model,
        opened.tokenizer,
        opened.contract,
        opened.dtype,
        directory,
        opened.inferred,
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
    inferred = None
    contract = ScoringContract.load(directory)
    if contract is None:
        inferred = _inferred(layout, tokenizer)
        contract = inferred.contract
    if layout.head.num_outputs != len(contract.heads):
        raise CheckpointError(
            f"{directory}: the head has {layout.head.num_outputs} outputs but the contract names "
            f"{len(contract.heads)} ({', '.join(contract.heads)}); name every output: rayward "
            f"convert {directory} DST --heads name=weight,..."
        )
    check_manifest(directory)
    dtype = contract.dtype if dtype == "auto" else dtype
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype is {dtype!r}; it must be auto, float32, bfloat16 or float16")
    return Opened(layout, tokenizer, contract, dtype, inferred)


def _check_pooling(model: RewardModel, directory: Path) -> None:
    """Raise CheckpointError unless a foreign network itself scores a row as we do.

    An encoder with a pooler of its own would otherwise get numbers that mean nothing. The row has
    no padding, which moves scores in half precision by more than this allows; that nothing attends
    to padding is the engine's probe to find.
    """
    device = next(model.parameters()).device
    pad = model.network.config.pad_token_id  # where plain transformers would stop reading
    vocab_size = model.network.config.get_text_config().vocab_size
    ids = [i for i in (n % vocab_size for n in range(5, 14)) if i != pad] or [0]
    row = torch.tensor([ids], device=device)
    length = torch.tensor([row.shape[1]], device=device)
    with torch.inference_mode():
        found = model(row, length).flatten().tolist()
    own = own_scores(model.network, ids, len(found))
    if not all(map(math.isfinite, (*found, *own))):
        raise CheckpointError(f"{directory}: {_not_finite(model)}")
    for ours, theirs in zip(found, own, strict=True):
        if not abs(ours - theirs) <= 2e-2 * max(1.0, abs(theirs)):
            raise CheckpointError(
                f"{directory}: {type(model.network).__name__} scores {theirs:.4g} where its head "
                f"at the last token says {ours:.4g}; it pools or attends in another way than this "
                "version knows"
            )


def _not_finite(model: RewardModel) -> str:
    for name, parameter in model.network.named_parameters():
        if not torch.isfinite(parameter).all():
            return f"its weights hold numbers that are not finite (NaN or infinity, in {name})"
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    other = "float32" if dtype == "bfloat16" else "bfloat16 or float32"
    hint = "" if dtype == "float32" else f"; load it with dtype {other}"
    return f"its scores overflow in {dtype}{hint}"


def check_directory(path: str | Path) -> Path:
    """The directory as a path. Raises CheckpointError unless it holds a trained reward model."""
    return recognise(path).directory
