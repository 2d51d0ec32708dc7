"""The weights of a directory of any layout, in `transformers`' plain class wherever that can be."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from reward_actor.contract import weight_files
from reward_actor.model.directory import CheckpointError, code_reference, quantisation, tensors
from reward_actor.model.head_weights import activation_of, head_of
from reward_actor.model.heads import ACTIVATION_SETTING, Head, is_embedding
from reward_actor.model.layouts import ADAPTER_WEIGHTS, VALUE_HEAD, Layout
from reward_actor.model.reward_model import Float32Layers, head_name

# Settings of config.json that mean something to other systems only.
CUSTOM_SETTINGS = (
    "architectures",
    "auto_map",
    "mean",
    "normalize_reward",
    "std",
    "value_head_prefix",
)

# How the networks that come with their own code return a score: a tensor, or an output with one of
# these; the first of a tuple.
_SCORES = ("logits", "rewards", "reward", "scores", "score", "end_scores", "values", "value")


def load_network(
    layout: Layout, dtype: torch.dtype, *, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The network with its trained weights, on the CPU.

    A head with a bias keeps it, also where the plain class has none. Raises CheckpointError for
    weights that do not fit, code that may not run, an adapter that cannot be merged.
    """
    layout.require_trust(trust_remote_code)
    if layout.kind == "remote_code":
        return _own_code(layout, dtype)
    config = AutoConfig.from_pretrained(layout.base, trust_remote_code=False)
    config.num_labels = layout.head.num_outputs
    if layout.kind == "peft":
        return _merged(layout, config, dtype)
    if layout.kind == "hf" and _is_plain(layout, config):
        return from_directory(layout.base, config, dtype)
    if quantisation(layout.config) is not None:
        raise CheckpointError(
            f"{layout.directory} has quantised weights and a head that is not one linear layer "
            f"called {plain_head(config)}, without a bias; give the model that was quantised"
        )
    weights = _weights(layout.base, layout.prefix)
    return network_of(weights, config, layout.head, dtype, str(layout.base))


def _is_plain(layout: Layout, config: PretrainedConfig) -> bool:
    """Whether the plain class reads the base's weights as they are: the head, too, under its name,
    without a bias, and no wider than the body."""
    if layout.head.layers != (plain_head(config),) or layout.prefix:
        return False
    stored = tensors(layout.base)
    [head] = layout.head.layers
    name = f"{head}.weight"
    narrow = any(dtype in ("BF16", "F16") for _, dtype in stored.values())
    is_wider = name in stored and stored[name][1] == "F32" and narrow
    return f"{head}.bias" not in stored and not is_wider


def _weights(directory: Path, prefix: str = "") -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): weight
        for path in weight_files(directory)
        for name, weight in load_file(path).items()
    }


def _stored(directory: Path, name: str) -> Tensor | None:
    """One weight as it is stored, before any rounding; None where there is none of that name."""
    for path in weight_files(directory):
        with safe_open(path, framework="pt") as file:
            if name in file.keys():  # noqa: SIM118 -- not a dict
                return cast("Tensor", file.get_tensor(name))
    return None


def _merged(layout: Layout, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The base with the adapter added to its weights, in float32, then rounded to `dtype`."""
    try:
        from peft import PeftModel, get_peft_model_state_dict
    except ImportError as error:
        raise CheckpointError(
            f"{layout.directory} is an adapter; loading it needs the peft library: "
            'pip install "rayward[peft]"'
        ) from error
    own = load_file(layout.directory / ADAPTER_WEIGHTS)
    value_head = layout.directory / VALUE_HEAD
    head = plain_head(config)
    has_head = f"base_model.model.{head}.weight" in own
    bias_of_base = f"{layout.prefix}{head}.bias" in tensors(layout.base)
    is_plain = has_head and not bias_of_base and not layout.prefix
    if not value_head.exists() and (is_plain or _is_plain(layout, config)):
        base = from_directory(layout.base, config, torch.float32, head_elsewhere=has_head)
    else:
        weights = _weights(layout.base, layout.prefix)
        if value_head.exists():
            weights |= load_file(value_head)
        if has_head:
            weights.pop(f"{head}.bias", None)  # of another head
            weights[f"{head}.weight"] = own[f"base_model.model.{head}.weight"]
        base = network_of(weights, config, layout.head, torch.float32, str(layout.base))
    misfit = f"{layout.directory} does not fit {layout.base}"
    if layout.vocab_size not in (None, base.get_input_embeddings().num_embeddings):
        # Tokens that were added for the training; the adapter has all their weights.
        base.resize_token_embeddings(layout.vocab_size, mean_resizing=False)
    try:
        adapted: Any = PeftModel.from_pretrained(base, layout.directory, config=_peft(layout))
    except RuntimeError as error:  # shapes that differ
        raise CheckpointError(f"{misfit}: {error}") from error
    # The library only warns of weights that it finds no place for, and draws missing ones. Left to
    # itself it also asks the hub whether embeddings belong to the adapter.
    saved = adapted.peft_config["default"].modules_to_save or ()
    embeddings = any(
        is_embedding(name) and not any(f".{module}." in name for module in saved) for name in own
    )
    known = get_peft_model_state_dict(adapted, save_embedding_layers=embeddings)
    apart = known.keys() ^ own.keys()
    if apart:
        raise CheckpointError(
            f"{misfit}: {min(apart)} ({len(apart)} in all) is in only one of the two. Check "
            "base_model_name_or_path in adapter_config.json"
        )
    if not hasattr(adapted.base_model, "merge_and_unload"):
        raise CheckpointError(
            f"{layout.directory} is a {type(adapted.base_model).__name__}, which cannot be merged "
            "into its base; only adapters that add to weights (LoRA and its kin) can"
        )
    merged = cast("PreTrainedModel", adapted.merge_and_unload(safe_merge=True))
    of_head = getattr(merged, head)
    wide = set(of_head.parameters())  # as in `head_of`, and in what `convert` makes of it
    if isinstance(of_head, nn.Linear):
        wide.remove(of_head.weight)
    for parameter in merged.parameters():  # not the buffers: rotary frequencies stay in float32
        if parameter not in wide:
            parameter.data = parameter.data.to(dtype)
    merged.config.dtype = dtype
    return merged


def _peft(layout: Layout) -> Any:
    """An adapter's settings. Those for a causal model would look for its methods in the network."""
    from peft import PeftConfig

    config = PeftConfig.from_pretrained(str(layout.directory))
    if config.task_type != "SEQ_CLS":
        config.task_type = None
    return config


def _own_code(layout: Layout, dtype: torch.dtype) -> PreTrainedModel:
    """A network from the directory's own code; as the plain class if that provably scores alike."""
    auto, reference = code_reference(layout.config)
    auto_class = AutoModel if auto == "AutoModel" else AutoModelForSequenceClassification
    custom, report = auto_class.from_pretrained(
        layout.directory,
        dtype=dtype,
        use_safetensors=True,
        trust_remote_code=True,
        output_loading_info=True,
    )
    check_complete(report, str(layout.directory))
    _fill_normalisation(custom, layout)
    plain = _plain_twin(custom, layout, dtype)
    if plain is None:
        return cast("PreTrainedModel", custom)
    mean, std = layout.normalisation
    num_outputs = layout.head.num_outputs
    for first in (5, 11):
        row = [i for i in range(first, first + 9) if i != plain.config.pad_token_id]
        pairs = zip(
            own_scores(custom, row, num_outputs), own_scores(plain, row, num_outputs), strict=True
        )
        for own, raw in pairs:
            ours = (raw - mean) / std
            # A head in bfloat16 rounds its score to three digits.
            tolerance = 1e-4 if dtype == torch.float32 else 3e-2
            if not abs(own - ours) <= tolerance * max(1.0, abs(own)):
                raise CheckpointError(
                    f"{layout.directory}: {reference} scores {own:.4g} where its head at the last "
                    f"token says {ours:.4g}; its code does more than this version knows"
                )
    return plain


def own_scores(network: nn.Module, row: list[int], num_outputs: int = 1) -> list[float]:
    """What a network's own forward says of one row, by output. Raises CheckpointError if that is
    not so many numbers.

    A value for every token, (1, T) or (1, T, 1), counts by its last.
    """
    ids = torch.tensor([row], device=next(network.parameters()).device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    accepted = inspect.signature(network.forward).parameters
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values())
    with torch.inference_mode():
        output = network(**{k: v for k, v in inputs.items() if takes_all or k in accepted})
    found = [output[name] for name in _SCORES if isinstance(output, dict) and name in output]
    value = found[0] if found else output[0] if isinstance(output, tuple) else output
    if not isinstance(value, Tensor) or value.numel() not in (num_outputs, num_outputs * len(row)):
        raise CheckpointError(
            f"{type(network).__name__} returns no score that this version knows (a tensor, or an "
            f"output with one of {', '.join(_SCORES)})"
        )
    return cast("list[float]", value.flatten()[-num_outputs:].float().tolist())


def _fill_normalisation(network: nn.Module, layout: Layout) -> None:
    """Write mean and std of config.json into the network's buffers.

    Code that fills them in __init__ loses them: loading leaves buffers that are not saved unset.
    """
    for name in ("mean", "std"):
        buffer = dict(network.named_buffers()).get(name)
        if buffer is not None and name in layout.config:
            buffer.fill_(float(layout.config[name]))


def _plain_twin(
    custom: PreTrainedModel, layout: Layout, dtype: torch.dtype
) -> PreTrainedModel | None:
    """The plain class with a custom network's weights; None where it is more than body and head."""
    parts = {name.split(".")[0] for name, _ in custom.named_parameters()} - {"lm_head"}
    head = layout.head
    if len(head.layers) > 1:
        head = replace(head, activation=activation_of(custom.get_submodule(head.name)))
        if head.activation is None:
            return None
    for name, body in custom.named_children():
        if parts != {name, head.name}:
            continue
        config_class: Any = getattr(type(body), "config_class", None)
        if config_class not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
            continue
        plain: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[config_class]
        config = _plain_config(cast("PretrainedConfig", body.config), config_class)
        config.num_labels = head.num_outputs
        with torch.device("meta"):
            twin = getattr(plain(config), plain.base_model_prefix)
        if type(twin) is not type(body):
            continue
        weights = {
            key if not key.startswith(f"{name}.") else "body." + key[len(name) + 1 :]: weight
            for key, weight in custom.state_dict().items()
            if key not in ("mean", "std")  # buffers; in the contract, and compared with below
        }
        for name in (f"{layer}.{kind}" for layer in head.layers for kind in ("weight", "bias")):
            # As in `head_of`: a plain head beside a float32 body is rounded with it.
            is_rounded = len(head.layers) == 1 and layout.dtype == "float32"
            stored = _stored(layout.directory, name)
            if stored is not None and not (is_rounded and name.endswith("weight")):
                weights[name] = stored
        return network_of(weights, config, head, dtype, str(layout.directory), "body.")
    return None


def _plain_config(config: PretrainedConfig, config_class: Any) -> PretrainedConfig:
    settings = {k: v for k, v in config.to_dict().items() if k not in CUSTOM_SETTINGS}
    settings.pop("model_type", None)  # custom code may have given its own
    return cast("PretrainedConfig", config_class(**settings))


# What a network may leave unread: the language model's head, and tables that older versions of
# `transformers` saved although they are computed.
_UNUSED = re.compile(
    r"(^|\.)(lm_head|embed_out)\.|rotary_emb\.inv_freq$|\.(attn|attention)\.(masked_)?bias$"
)


def network_of(
    weights: Mapping[str, Tensor],
    config: PretrainedConfig,
    head: Head,
    dtype: torch.dtype,
    source: str,
    body_prefix: str = "",
) -> PreTrainedModel:
    """`transformers`' sequence classifier for `config`, filled with weights under other names.

    `body_prefix` is what stands before the body's names. Raises CheckpointError, naming `source`,
    unless every weight finds its place.
    """
    prefix = plain_class(config).base_model_prefix + "."
    inside = any(name.startswith(body_prefix + prefix) for name in weights)
    of_head = {f"{layer}.{kind}" for layer in head.layers for kind in ("weight", "bias")}
    renamed: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if name in of_head:
            continue
        if body_prefix and not name.startswith(body_prefix):
            renamed[name] = tensor  # reported as unexpected
        else:
            name = name.removeprefix(body_prefix)
            renamed[name if inside else prefix + name] = tensor
    network, report = plain_class(config).from_pretrained(
        None, config=config, state_dict=renamed, dtype=dtype, output_loading_info=True
    )
    name = plain_head(config)
    report["missing_keys"] = {k for k in report["missing_keys"] if not k.startswith(f"{name}.")}
    check_complete(report, source)
    built = head_of(weights, head, dtype)
    if built.in_features != config.get_text_config().hidden_size:
        raise CheckpointError(
            f"{source}: its head reads {built.in_features} hidden units, and its body has "
            f"{config.get_text_config().hidden_size}"
        )
    setattr(network, name, built)
    if isinstance(built, Float32Layers):
        setattr(network.config, ACTIVATION_SETTING, head.activation)
    return cast("PreTrainedModel", network)


def from_directory(
    directory: Path, config: PretrainedConfig, dtype: torch.dtype, head_elsewhere: bool = False
) -> PreTrainedModel:
    """The sequence classifier in a directory, which lacks a trained head if `head_elsewhere`.

    Raises CheckpointError unless every weight finds its place.
    """
    try:
        network, report = plain_class(config).from_pretrained(  # never a class of its own
            directory, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
    except RuntimeError as error:  # sizes that differ; it has printed which ones
        raise CheckpointError(
            f"{directory} does not hold the weights of its own config.json: "
            f"{_misfit(directory, config) or error}"
        ) from error
    if head_elsewhere:
        head = plain_head(config) + "."
        report["missing_keys"] = {k for k in report["missing_keys"] if not k.startswith(head)}
    check_complete(report, str(directory))
    compute_in_own_dtype(network)
    return cast("PreTrainedModel", network)


def compute_in_own_dtype(network: Any) -> None:
    """Leave out bitsandbytes' way for processors with AVX-512 (as of 0.50): it multiplies in
    bfloat16 whatever the dtype, takes weights in blocks of 64 only, and downloads a kernel."""
    for module in network.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _misfit(directory: Path, config: PretrainedConfig) -> str | None:
    """The first weight of another size than its configuration asks for, in words."""
    with torch.device("meta"):
        expected = plain_class(config)(config).state_dict()
    for name, (shape, _) in sorted(tensors(directory).items()):
        asked = list(expected[name].shape) if name in expected else shape
        if asked != shape:
            return f"{name} has shape {shape}, and config.json asks for {asked}"
    return None


def check_complete(report: Mapping[str, Any], source: str) -> None:
    """Raise CheckpointError if `from_pretrained` reports weights missing or left over."""
    absent = sorted(report["missing_keys"]) + sorted(str(k) for k in report["mismatched_keys"])
    if absent:
        raise CheckpointError(
            f"{source} does not hold the weights of its own config.json: {absent[0]} "
            f"({len(absent)} in all) is missing or has another shape"
        )
    unread = sorted(name for name in report["unexpected_keys"] if not _UNUSED.search(name))
    if unread:
        raise CheckpointError(
            f"{source} holds weights that its config.json knows nothing of: {unread[0]} "
            f"({len(unread)} in all). Scoring without them would give other rewards"
        )


def is_plain(network: PreTrainedModel) -> bool:
    """Whether `transformers` alone can load the network."""
    return type(network).__module__.startswith("transformers.models.")


def plain_class(config: PretrainedConfig) -> Any:
    """The class of `transformers` for a configuration. Raises CheckpointError where it has none."""
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise CheckpointError(
            f"transformers has no sequence classifier for model_type {config.model_type!r}"
        )
    return MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)]


def plain_head(config: PretrainedConfig) -> str:
    """The head's name in the plain class, which is built without weights to tell."""
    with torch.device("meta"):
        return head_name(plain_class(config)(config))
