"""Whose directory this is: the layouts in which reward models are saved, ours and others'.

Recognised from config.json and the headers of safetensors files alone: nothing here reads weights,
unpickles or runs a model's code.

hf              `*ForSequenceClassification` of `transformers`, with a head `score` or `classifier`;
                so do our own exports and TRL's RewardTrainer look
openrlhf        the weights of a base model with a linear head of any name beside it, which
                `value_head_prefix` gives; `mean` and `std` lie in config.json
remote_code     a network whose class is Python code in the directory (`auto_map`)
peft            an adapter (adapter_config.json) on a base model in another directory
deepspeed_chat  pytorch_model.bin, a pickle; read by `rayward convert` only
"""

from __future__ import annotations

import json
import math
import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open

from reward_actor.contract import digests, sha256_file, weight_files

PICKLED_WEIGHTS = "pytorch_model.bin"

# What DeepSpeed-Chat calls the body inside its reward model: as it was spelled for most of its life
# and as it is since; v_head.weight is the head.
BODY_PREFIXES = ("rwtranrsformer.", "rwtransformer.")

HEADS = ("score", "classifier", "value_head", "v_head", "regression_head", "reward_head")

# What data parallelism, torch.compile and PEFT put before every name.
_WRAPPERS = ("module.", "_orig_mod.", "base_model.model.")

_DTYPES = {"BF16": "bfloat16", "F16": "float16"}

MAX_PICKLE_BYTES = 64 * 2**20


class CheckpointError(ValueError):
    """This directory cannot be served; the message says what to do."""


def read_config(directory: Path) -> dict[str, Any]:
    """config.json. Raises CheckpointError where it is missing or not a JSON object."""
    path = directory / "config.json"
    if not path.exists():
        hint = "; did you mean its export/ folder?" if (directory / "export").is_dir() else ""
        raise CheckpointError(f"{directory} holds no config.json, so no model{hint}")
    config = json_object(path)
    quantised = config.get("quantization_config")
    if quantised:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else None
        raise CheckpointError(
            f"{directory} holds quantised weights ({method or 'quantization_config'} in its "
            "config.json), which this version does not read; give the model that was quantised, or "
            "save it with whole weights (model.dequantize())"
        )
    return config


def tensors(
    directory: Path, files: Iterable[Path] | None = None
) -> dict[str, tuple[list[int], str]]:
    """Shape and dtype of every tensor in the directory's safetensors files, from their headers."""
    if files is None:
        files = weight_files(directory)
        index = directory / "model.safetensors.index.json"
        shards = json_object(index).get("weight_map", {}) if index.exists() else {}
        if not isinstance(shards, dict):
            raise CheckpointError(f"{index}: weight_map is not an object of names and files")
        for shard in shards.values():
            if Path(str(shard)).name != shard:
                raise CheckpointError(f"{index} names weights outside its directory: {shard!r}")
    found: dict[str, tuple[list[int], str]] = {}
    for path in files:
        try:
            with safe_open(path, framework="np") as file:
                for name in file.keys():  # noqa: SIM118 -- not a dict
                    part = file.get_slice(name)
                    found[name] = (part.get_shape(), part.get_dtype())
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is damaged: {error}") from error
    return found


def widest(dtypes: Iterable[str]) -> str:
    """The one dtype that holds every floating-point weight without rounding, as torch names it."""
    floats = {_DTYPES.get(dtype, "float32") for dtype in dtypes if dtype.startswith(("F", "BF"))}
    return floats.pop() if len(floats) == 1 else "float32"


def json_object(path: Path) -> dict[str, Any]:
    """A file's JSON object. Raises CheckpointError for anything else."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return data


def is_deepspeed_chat(directory: Path) -> bool:
    """Whether pytorch_model.bin holds DeepSpeed-Chat's names: never unpickled."""
    path = directory / PICKLED_WEIGHTS
    if not path.is_file() or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.filename.endswith("data.pkl") and entry.file_size <= MAX_PICKLE_BYTES:
                names = archive.read(entry)
                return any(prefix.encode() in names for prefix in BODY_PREFIXES)
    return False


def pickle_hint(directory: Path) -> str:
    """A clause about the pickled weights of a directory that has no others; or nothing."""
    if is_deepspeed_chat(directory):
        return (
            f": it is a reward model of DeepSpeed-Chat, and {PICKLED_WEIGHTS} is a pickle, which "
            f"can run code when it is read. Convert it once: rayward convert {directory} DST"
        )
    pickled = sorted(directory.glob("*.bin")) + sorted(directory.glob("*.pt"))
    if not pickled:
        return ""
    return (
        f" ({pickled[0].name} is a pickle, which can run code when it is read; save the model with "
        "safe_serialization=True)"
    )


ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
# The class of OpenRLHF's reward models, new and old; both are made at run time.
OPENRLHF_CLASSES = ("RewardModel", "LLMForSequenceRegression")

Kind = Literal["hf", "openrlhf", "remote_code", "peft"]


@dataclass(frozen=True)
class Layout:
    """What a directory holds and where its parts lie.

    directory    as it was given.
    base         holds config.json and the body's weights; for an adapter another directory.
    config       base's config.json.
    head         the head's name in the weights.
    num_outputs  rows of the head.
    dtype        the widest in which a weight is stored; float32 for an adapter, which is merged.
    prefix       what stands before the name of every weight: a wrapper's that was saved along.
    vocab_size   of an adapter that brings embeddings of its own; None: config.json has it.
    """

    kind: Kind
    directory: Path
    base: Path
    config: Mapping[str, Any]
    head: str
    num_outputs: int
    dtype: str
    prefix: str = ""
    vocab_size: int | None = None

    @property
    def normalisation(self) -> tuple[float, float]:
        """(mean, std) by which the system that saved the directory normalises; (0, 1): it does not.

        OpenRLHF decides by a flag of the run, not by the `normalize_reward` that its training has
        saved (always false), so that a mean and std in its config.json count. A model's own code
        can only go by config.json. Raises CheckpointError for values that cannot normalise.
        """
        known = "mean" in self.config and "std" in self.config
        if self.kind == "remote_code":
            known = known and bool(self.config.get("normalize_reward", True))
        if not known or self.kind not in ("openrlhf", "remote_code"):
            return 0.0, 1.0
        mean, std = self.config["mean"], self.config["std"]
        numbers = all(type(n) in (int, float) and math.isfinite(n) for n in (mean, std))
        if not numbers or std <= 0:
            raise CheckpointError(
                f"{self.base / 'config.json'}: mean is {mean!r} and std is {std!r}; they must be "
                "finite numbers with std above 0. Correct them, or remove both"
            )
        return float(mean), float(std)

    def digests(self) -> dict[str, str]:
        """sha256 of every file that decides a reward, by name."""
        files = digests(self.directory)
        if self.kind == "remote_code":
            code = sorted(self.directory.rglob("*.py"))
            files |= {str(p.relative_to(self.directory)): sha256_file(p) for p in code}
        if self.kind == "peft":
            files[ADAPTER_CONFIG] = sha256_file(self.directory / ADAPTER_CONFIG)
            files |= {f"base/{name}": digest for name, digest in digests(self.base).items()}
        return files

    def require_trust(self, trust_remote_code: bool) -> None:
        """Raise CheckpointError unless the model's own code is absent or may run."""
        if self.kind != "remote_code" or trust_remote_code:
            return
        raise CheckpointError(
            f"{self.directory} needs Python code of its own (auto_map in config.json), which is "
            "not run unless you allow it. Read the code, then pass trust_remote_code=True; or "
            f"remove the need: rayward convert {self.directory} DST --trust-remote-code"
        )


def recognise(path: str | Path) -> Layout:
    """The layout of a directory. Raises CheckpointError unless it holds a trained reward model."""
    directory = Path(path).expanduser()
    if not directory.is_dir():
        raise CheckpointError(
            f"{directory} is not a directory; give the export of a training (its export/ folder)"
        )
    if (directory / ADAPTER_CONFIG).exists():
        return _adapter(directory)
    config = read_config(directory)
    found, prefix = _unwrapped(directory, tensors(directory))
    head = _head(directory, config, found)
    shape, _ = found[f"{head}.weight"]
    return Layout(
        _kind(directory, config, head),
        directory,
        directory,
        config,
        head,
        shape[0],
        widest(dtype for _, dtype in found.values()),
        prefix,
    )


Tensors = dict[str, tuple[list[int], str]]


def _unwrapped(directory: Path, found: Tensors) -> tuple[Tensors, str]:
    """The tensors without a wrapper's prefix, and that. Raises CheckpointError for none and for
    empty ones."""
    if not found:
        raise CheckpointError(f"{directory} holds no .safetensors weights{pickle_hint(directory)}")
    empty = [name for name, (shape, _) in found.items() if 0 in shape]
    if empty:
        raise CheckpointError(
            f"{directory} holds weights of size 0 ({empty[0]}, {len(empty)} in all), as ZeRO-3 "
            "leaves them when they are saved without being gathered. Save the model again with "
            "stage3_gather_16bit_weights_on_model_save, or make whole weights of the training's "
            "checkpoint with zero_to_fp32.py"
        )
    prefix = ""
    while wrapper := next((w for w in _WRAPPERS if all(n.startswith(w) for n in found)), None):
        prefix += wrapper
        found = {name.removeprefix(wrapper): tensor for name, tensor in found.items()}
    return found, prefix


def tokenizer_directory(path: Path) -> Path:
    """Where the tokenizer of a directory lies: there, or with an adapter's base.

    Raises CheckpointError for a directory without one; a bare vocabulary does not say how a text
    begins.
    """
    whole = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model")
    if not path.is_dir() or any((path / name).exists() for name in whole):
        return path
    if (path / ADAPTER_CONFIG).exists():
        return tokenizer_directory(_adapter_base(path))
    raise CheckpointError(
        f"{path} holds no tokenizer. Convert it with the one that it was trained with: "
        f"rayward convert {path} DST --tokenizer-from DIR"
    )


def _kind(directory: Path, config: Mapping[str, Any], head: str) -> Kind:
    import transformers

    architecture = architecture_of(config)
    if "value_head_prefix" in config or architecture in OPENRLHF_CLASSES:
        return "openrlhf"
    if architecture.endswith("ForSequenceClassification") and hasattr(transformers, architecture):
        return "hf"  # whatever code was beside it before `transformers` had the class
    name = code_reference(config)[1]
    if hasattr(transformers, name.split(".")[-1]):
        return "hf" if head in ("score", "classifier") else "openrlhf"
    _check_code_is_here(directory)
    return "remote_code"


def _check_code_is_here(directory: Path) -> None:
    """Raise CheckpointError if any of the code that would run lies in another repository."""
    for file in (directory / "config.json", directory / "tokenizer_config.json"):
        auto_map = json_object(file).get("auto_map") if file.exists() else None
        references = json.dumps(auto_map)
        if "--" in references:
            raise CheckpointError(
                f"{file}: auto_map takes code from another repository ({references}); copy the "
                "code into the directory and name it there without a repository"
            )


def architecture_of(config: Mapping[str, Any]) -> str:
    """The first class that config.json names, or nothing."""
    named = config.get("architectures")
    return named[0] if isinstance(named, list) and named and isinstance(named[0], str) else ""


def code_reference(config: Mapping[str, Any]) -> tuple[str, str]:
    """(auto class, module.Class) of a network's own code; the plain auto class where it has none.

    The second part is then the name of a class of `transformers`.
    """
    auto_map = config.get("auto_map")
    for auto in ("AutoModelForSequenceClassification", "AutoModel"):
        if isinstance(auto_map, dict) and isinstance(auto_map.get(auto), str):
            return auto, auto_map[auto]
    return "AutoModelForSequenceClassification", "AutoModelForSequenceClassification"


def _head(directory: Path, config: Mapping[str, Any], names: Iterable[str]) -> str:
    """The head's name in the weights. Raises CheckpointError without exactly one linear head."""
    names = set(names)
    prefix = config.get("value_head_prefix")
    if isinstance(prefix, str) and f"{prefix}.weight" in names:
        return prefix
    found = [head for head in HEADS if f"{head}.weight" in names]
    if len(found) == 1:
        return found[0]
    if found:
        raise CheckpointError(
            f"{directory} has several heads ({', '.join(found)}); say which one scores: "
            '"value_head_prefix" in its config.json'
        )
    nested = sorted(name for name in names if name.split(".")[0] in HEADS)
    if nested:
        raise CheckpointError(
            f"{directory}: its head is not one linear layer (it has {nested[0]}); this version "
            "knows only linear heads"
        )
    architecture = architecture_of(config) or "a network"
    others = _heads_of_another_kind(names)
    if others:
        raise CheckpointError(
            f"{directory} has a head of a kind that this version does not know: {architecture} "
            f"with {', '.join(others)}. It knows one linear layer, called {', '.join(HEADS)} or as "
            '"value_head_prefix" in config.json says'
        )
    raise CheckpointError(
        f"{directory} has no trained reward head: {architecture} without any of "
        f"{', '.join(head + '.weight' for head in HEADS)}. Serving it would score with random "
        f"numbers. Train it first: rayward train --model.path {directory}"
    )


# Parts of a body, and of a causal language model, that stand beside its layers.
_NO_HEAD = re.compile(r"embed|norm|wte|wpe|ln_|rotary|pos|lm_head|^h$|^layers$|proj_(in|out)$")


def _heads_of_another_kind(names: set[str]) -> list[str]:
    """The first weight of every part beside the body, which is the part with the most weights."""
    parts: dict[str, list[str]] = {}
    for name in sorted(names):
        parts.setdefault(name.split(".")[0], []).append(name)
    body = max(parts, key=lambda part: len(parts[part]))
    return [own[0] for part, own in parts.items() if part != body and not _NO_HEAD.search(part)]


def _adapter(directory: Path) -> Layout:
    """The layout of an adapter: its head is its own (`modules_to_save`) or its base's."""
    weights = directory / ADAPTER_WEIGHTS
    if not weights.exists():
        raise CheckpointError(
            f"{directory} holds {ADAPTER_CONFIG} but no {ADAPTER_WEIGHTS}; save the adapter with "
            "safe_serialization=True, or remove the file if the model was merged"
        )
    base = _adapter_base(directory)
    own = {
        name.removeprefix("base_model.model."): tensor
        for name, tensor in tensors(directory, [weights]).items()
    }
    config = read_config(base)
    theirs, prefix = _unwrapped(base, tensors(base))
    heads = {name: own[name] for name in (f"{head}.weight" for head in HEADS) if name in own}
    head = _head(directory, config, heads or theirs)
    if _kind(base, config, head) == "remote_code":
        raise CheckpointError(
            f"{directory} is an adapter on {base}, which needs Python code of its own. Convert the "
            f"base first (rayward convert {base} DST --trust-remote-code) and name DST as "
            f"base_model_name_or_path in {ADAPTER_CONFIG}"
        )
    shape, _ = {**theirs, **heads}[f"{head}.weight"]
    embeddings = [shape[0] for name, (shape, _) in own.items() if is_embedding(name)]
    vocab_size = embeddings[0] if embeddings else None
    return Layout("peft", directory, base, config, head, shape[0], "float32", prefix, vocab_size)


def is_embedding(name: str) -> bool:
    """Whether an adapter's weight is a whole table of input embeddings."""
    parts = name.split(".")
    is_table = any(part in ("embed_tokens", "wte", "word_embeddings", "embed_in") for part in parts)
    return is_table and parts[-1] == "weight" and "lora" not in name


def _adapter_base(directory: Path) -> Path:
    """The directory that an adapter names as its base, from its own place or the current one."""
    name = json_object(directory / ADAPTER_CONFIG).get("base_model_name_or_path")
    places = [] if not isinstance(name, str) or not name else [directory / name, Path(name)]
    base = next((place for place in places if place.is_dir()), None)
    if base is None:
        raise CheckpointError(
            f"{directory} is an adapter on {name!r}, which is not a directory here. Download that "
            f"model and write its directory as base_model_name_or_path into {ADAPTER_CONFIG}"
        )
    if (base / ADAPTER_CONFIG).exists():
        raise CheckpointError(f"{directory} is an adapter on an adapter ({base}); merge that first")
    return base
