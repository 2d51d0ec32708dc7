"""Other systems' reward models into our layout; the one place that reads a pickle, restricted."""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from reward_actor.contract import CONTRACT_FILE, DTYPES, FLOAT32_TOLERANCE, ScoringContract
from reward_actor.devices import resolve_device
from reward_actor.export import export
from reward_actor.model.directory import CheckpointError, read_config
from reward_actor.model.heads import ACTIVATION_SETTING, Head
from reward_actor.model.inferred import contract_for, infer_contract
from reward_actor.model.layouts import (
    ADAPTER_CONFIG,
    BODY_PREFIXES,
    PICKLED_WEIGHTS,
    Layout,
    is_deepspeed_chat,
    recognise,
)
from reward_actor.model.load import load_contract
from reward_actor.model.manifest import check_manifest
from reward_actor.model.reward_model import Float32Layers, head_name
from reward_actor.model.tokenizer import load_tokenizer
from reward_actor.model.weights import CUSTOM_SETTINGS, is_plain, load_network, network_of
from reward_actor.readout import Readout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    tokenizer_from: str | Path | None = None,
    format: str | None = None,
    dtype: str = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
    ends_with: str | None = None,
    append_eos: bool | None = None,
    head_rows: str | None = None,
    heads: str | None = None,
    template_args: Mapping[str, Any] | None = None,
    tell: Callable[[str], object] = lambda _: None,
) -> ScoringContract:
    """Write the reward model in `source`, of any layout, to `destination` in ours.

    format: "chat" or "text", by default "chat" where the tokenizer has a template (DeepSpeed-Chat
    knows none); dtype: of the weights, by default the widest that the source holds, so that no
    reward changes in any dtype; ends_with, append_eos: how a sequence ends ("none": with its
    completion) and whether EOS comes behind that, by default as in the system that trained the
    model (`reward_actor.model.ends`); head_rows: "A" or "A-B", tokens or their ids: the reward is
    the logit of A in a language model's own head, or A's less B's; heads: "name=weight,...": the
    head's outputs in order, whose weighted sum is the reward; template_args: of the contract; tell:
    gets a line for each choice about a sequence's end, and why.
    Raises CheckpointError for what cannot be converted or scores differently afterwards, ValueError
    for a destination that exists or a choice that the source's own contract contradicts. Nothing is
    left at `destination` then.
    """
    source, destination = Path(source).expanduser(), Path(destination).expanduser()
    if dtype not in ("auto", *DTYPES):
        raise ValueError(f"dtype is {dtype!r}; it must be auto, {', '.join(DTYPES)}")
    if format not in (None, "chat", "text"):
        raise ValueError(f"format is {format!r}; it must be chat or text")
    device = resolve_device(device)
    if destination.exists():
        raise ValueError(f"{destination} exists; convert into a directory that does not")
    place = Path(tokenizer_from).expanduser() if tokenizer_from else source
    if not place.is_dir():
        raise CheckpointError(f"{place} is not a directory")
    if _is_pickled(source):
        if ends_with is not None or append_eos is not None:
            raise ValueError(
                f"{source} is of DeepSpeed-Chat, which ends a text with nothing; leave --ends-with "
                "and --append-eos away"
            )
        if head_rows is not None:
            raise ValueError(f"{source} has a head of its own; leave --head-rows away")
        tokenizer = load_tokenizer(place)
        network, contract = _deepspeed_chat(
            source, tokenizer, format or "text", dtype, template_args
        )
    else:
        if head_rows is not None and (source / CONTRACT_FILE).exists():
            raise ValueError(f"{source} is a reward model already; leave --head-rows away")
        rows = () if head_rows is None else _rows(head_rows, load_tokenizer(place), tell)
        layout = recognise(source, rows)
        layout.require_trust(trust_remote_code)
        check_manifest(source)
        tokenizer = load_tokenizer(place, trust_remote_code=trust_remote_code)
        contract = _contract(layout, tokenizer, format, ends_with, append_eos, template_args, tell)
        stored = getattr(torch, layout.dtype if dtype == "auto" else dtype)
        network = load_network(layout, stored, trust_remote_code=trust_remote_code)
    if dtype != "auto":
        contract = replace(contract, dtype=dtype)
    if heads is not None:
        names, weights = _named(heads)
        contract = replace(contract, heads=names, head_weights=weights, held_out=None)
    _check_outputs(network, contract, source)
    network, contract = _without_bias(_plain(network, source), contract)
    return _write(network, tokenizer, contract, destination, device)


def _write(
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    contract: ScoringContract,
    destination: Path,
    device: str,
) -> ScoringContract:
    """Export, prove and put in its place; the contract with its golden rewards."""
    staging = destination.with_name(destination.name + ".converted")
    try:
        weights = network.state_dict()
        contract = export(
            staging, network.config, network, weights, tokenizer, contract, {}, device
        )
        _prove(network, contract)
        os.replace(staging, destination)
    finally:
        for left in (staging, staging.with_name(staging.name + ".partial")):
            shutil.rmtree(left, ignore_errors=True)
    return contract


def _rows(
    said: str, tokenizer: PreTrainedTokenizerFast, tell: Callable[[str], object]
) -> tuple[int, ...]:
    """The rows that --head-rows says: A or A-B, each a token or its id. Raises ValueError."""
    parts = [said] if said in tokenizer.get_vocab() else said.split("-", 1)
    rows = tuple(_row(part, tokenizer) for part in parts)
    told = [f"{row} ({tokenizer.convert_ids_to_tokens(row)!r})" for row in rows]
    tell(f"reward = the logit of token {' less that of token '.join(told)}")
    return rows


def _row(said: str, tokenizer: PreTrainedTokenizerFast) -> int:
    if said.isdecimal():
        return int(said)
    known = tokenizer.get_vocab().get(said)
    if known is not None:
        return int(known)
    ids = tokenizer(said, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise ValueError(f"head_rows: {said!r} is {len(ids)} tokens; give one token, or its id")
    return int(ids[0])


def _named(said: str) -> tuple[list[str], list[float]]:
    """Names and weights of "name=weight,...", or names alone. Raises ValueError."""
    pairs = [part.partition("=") for part in said.split(",")]
    names = [name.strip() for name, _, _ in pairs]
    try:
        weights = [float(weight) for _, equals, weight in pairs if equals]
    except ValueError:
        weights = [math.nan]
    are_numbers = all(map(math.isfinite, weights)) and len(weights) in (0, len(names))
    if not all(names) or not are_numbers:
        raise ValueError(f"heads is {said!r}; it must be name=weight,... or name,name,...")
    return names, weights


def _check_outputs(network: PreTrainedModel, contract: ScoringContract, source: Path) -> None:
    """Raise CheckpointError unless every output of the head has a name."""
    num_outputs = getattr(network, head_name(network)).out_features
    if num_outputs != len(contract.heads):
        raise CheckpointError(
            f"{source}: the head has {num_outputs} outputs, and {len(contract.heads)} have names "
            f"({', '.join(contract.heads)}); give each a name and a weight: --heads name=weight,..."
        )


def _contract(
    layout: Layout,
    tokenizer: PreTrainedTokenizerFast,
    format: str | None,
    ends_with: str | None,
    append_eos: bool | None,
    template_args: Mapping[str, Any] | None,
    tell: Callable[[str], object],
) -> ScoringContract:
    """The source's own contract, or an inferred one."""
    if (layout.directory / CONTRACT_FILE).exists():
        contract = load_contract(layout.directory)
        if format not in (None, contract.format):
            raise ValueError(
                f"format is {format!r}, but {layout.directory} was trained as {contract.format!r} "
                f"({CONTRACT_FILE}); leave --format away"
            )
        if ends_with is not None or append_eos is not None:
            raise ValueError(
                f"{layout.directory / CONTRACT_FILE} says how its sequences end; leave --ends-with "
                "and --append-eos away"
            )
        if template_args is not None:
            raise ValueError(
                f"{layout.directory / CONTRACT_FILE} says what its template is told; remove "
                "--template-args"
            )
        return contract
    inferred = infer_contract(
        layout,
        tokenizer,
        format,
        ends_with=ends_with,
        append_eos=append_eos,
        template_args=template_args,
    )
    for line in inferred.lines():
        tell(line)
    if inferred.doubt:
        warnings.warn(f"not settled by {layout.directory}: {inferred.doubt}", stacklevel=3)
    return inferred.contract


def _is_pickled(source: Path) -> bool:
    if (source / ADAPTER_CONFIG).exists() or any(source.glob("*.safetensors")):
        return False
    return is_deepspeed_chat(source)


def _deepspeed_chat(
    source: Path,
    tokenizer: PreTrainedTokenizerFast,
    format: str,
    dtype: str,
    template_args: Mapping[str, Any] | None,
) -> tuple[PreTrainedModel, ScoringContract]:
    """The network and the contract of a reward model that DeepSpeed-Chat trained.

    Its reward is the value before the first padding (`reward_model.py`), whose id is that of EOS:
    a text is scored at its last token and never gets an EOS. For OPT it starts to look after the
    `</s>` that OPT's tokenizer puts first (`num_padding_at_beginning=1`); with us the last token
    is found by length, so that nothing is left to skip, and the tokenizer's own tokens stay.
    """
    read_config(source)
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    config.num_labels = 1
    weights = _unpickle(source / PICKLED_WEIGHTS)
    prefix = next(p for p in BODY_PREFIXES if any(name.startswith(p) for name in weights))
    if "v_head.weight" not in weights:
        raise CheckpointError(
            f"{source / PICKLED_WEIGHTS} has no v_head.weight, so no trained reward head; give the "
            "directory that the second step of DeepSpeed-Chat saved"
        )
    floats = {
        str(w.dtype).removeprefix("torch.") for w in weights.values() if w.is_floating_point()
    }
    stored = (floats.pop() if len(floats) == 1 else "float32") if dtype == "auto" else dtype
    head, place = Head("v_head", ("v_head",), 1), f"{source / PICKLED_WEIGHTS}"
    network = network_of(weights, config, head, getattr(torch, stored), place, prefix)
    contract = contract_for(
        tokenizer,
        config,
        format=format,
        append_eos=False,
        template_args=template_args,
        dtype=stored,
    )
    starts = tokenizer("x")["input_ids"][:1]
    if config.model_type == "opt" and starts not in ([config.bos_token_id], [config.eos_token_id]):
        warnings.warn(
            f"{source} is an OPT model, but its tokenizer does not begin a text with </s> "
            f"(id {config.bos_token_id}), as OPT's does: texts will score otherwise than in "
            "DeepSpeed-Chat. Give the tokenizer of its training with --tokenizer-from DIR.",
            stacklevel=3,
        )
    return network, contract


def _unpickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a pickle, by name; torch's restricted unpickler runs no code."""
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path} is damaged or holds more than weights: {reason}") from error
    if not isinstance(weights, dict) or not all(isinstance(w, Tensor) for w in weights.values()):
        raise CheckpointError(f"{path} does not hold a model's weights by name")
    return weights


def _plain(network: PreTrainedModel, source: Path) -> PreTrainedModel:
    """The network, ready to be saved. Raises CheckpointError if it needs code of its own."""
    if not is_plain(network):
        raise CheckpointError(
            f"{source}: its {type(network).__name__} is more than a network of transformers with "
            "a linear head, so an export would need its code. Serve it as it is, with "
            "trust_remote_code=True"
        )
    has_layers = isinstance(getattr(network, head_name(network)), Float32Layers)
    for name in (*CUSTOM_SETTINGS, *(() if has_layers else (ACTIVATION_SETTING,))):
        vars(network.config).pop(name, None)
    return network


def _without_bias(
    network: PreTrainedModel, contract: ScoringContract
) -> tuple[PreTrainedModel, ScoringContract]:
    """The head's bias moved into the contract's mean: plain classes have no place for it.

    (w x + b - mean) / std is the same reward as (w x - (mean - b)) / std.
    """
    head = getattr(network, head_name(network))
    if not isinstance(head, nn.Linear) or head.bias is None:
        return network, contract
    means = [contract.mean - bias for bias in head.bias.tolist()]
    head.register_parameter("bias", None)
    if len(means) == 1:
        return network, replace(contract, mean=means[0])
    return network, replace(contract, head_means=means)


def _prove(network: PreTrainedModel, contract: ScoringContract) -> None:
    """Raise CheckpointError unless what was written scores as `transformers` scores the network."""
    if not getattr(network, "is_quantized", False):  # those stay as they are, in any dtype
        network.float()
    readout = Readout.of(contract)
    expected = contract.golden.raw_scores["float32"]
    tolerance = max(FLOAT32_TOLERANCE, contract.golden.tolerance["float32"])
    for sample, score in zip(contract.golden.samples, expected, strict=True):
        with torch.inference_mode():
            output = network(input_ids=torch.tensor([sample.input_ids]))
        own = float(readout.combined(output.logits[0].double().numpy()))
        if not abs(own - score) <= tolerance * max(1.0, abs(own)):
            raise CheckpointError(
                f"the converted model scores {score} where the source scores {own} "
                f"({json.dumps(sample.prompt)}); it was not written"
            )
