"""Whose directory this is: the layouts in which reward models are saved, ours and others'.

Recognised from config.json and the headers of safetensors files alone: nothing here reads weights,
unpickles or runs a model's code.

hf              `*ForSequenceClassification` of `transformers`, with a head `score` or `classifier`;
                so do our own exports and TRL's RewardTrainer look
value_head      a causal language model with `v_head.summary`, as TRL and LLaMA-Factory save it: in
                the model's file or in value_head.safetensors
openrlhf        the weights of a base model with a linear head of any name beside it, which
                `value_head_prefix` gives; `mean` and `std` lie in config.json
remote_code     a network whose class is Python code in the directory (`auto_map`)
peft            an adapter (adapter_config.json) on a base model in another directory; its head is
                its own, in value_head.safetensors or the base's
causal_lm       a language model, of whose own head rows are taken; read by `rayward convert` only
deepspeed_chat  pytorch_model.bin, a pickle; read by `rayward convert` only
"""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from reward_actor.contract import digests, sha256_file
from reward_actor.json_files import json_object
from reward_actor.model.directory import (
    CheckpointError,
    Tensors,
    architecture_of,
    code_reference,
    gguf_hint,
    quantisation,
    read_config,
    tensors,
    widest,
)
from reward_actor.model.heads import (
    HEADS,
    Head,
    check_activation,
    find_head,
    head_of_rows,
    is_embedding,
)

PICKLED_WEIGHTS = "pytorch_model.bin"

# What DeepSpeed-Chat calls the body inside its reward model: as it was spelled for most of its life
# and as it is since; v_head.weight is the head.
BODY_PREFIXES = ("rwtranrsformer.", "rwtransformer.")

# What data parallelism, torch.compile and PEFT put before every name.
_WRAPPERS = ("module.", "_orig_mod.", "base_model.model.")

MAX_PICKLE_BYTES = 64 * 2**20


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

VALUE_HEAD = "value_head.safetensors"

Kind = Literal["hf", "openrlhf", "value_head", "remote_code", "peft", "causal_lm"]


@dataclass(frozen=True)
class Layout:
    """What a directory holds and where its parts lie.

    directory    as it was given.
    base         holds config.json and the body's weights; for an adapter another directory.
    config       base's config.json.
    head         where it lies in the weights.
    dtype        the widest in which the body is stored; float32 for an adapter, which is merged.
    prefix       what stands before the name of every weight: a wrapper's that was saved along.
    vocab_size   of an adapter that brings embeddings of its own; None: config.json has it.
    """

    kind: Kind
    directory: Path
    base: Path
    config: Mapping[str, Any]
    head: Head
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


def recognise(path: str | Path, head_rows: tuple[int, ...] = ()) -> Layout:
    """The layout of a directory. Raises CheckpointError unless it holds a trained reward model.

    head_rows: one row of a language model's head to score by, or two whose difference counts.
    """
    directory = Path(path).expanduser()
    if not directory.is_dir():
        raise CheckpointError(
            f"{directory} is not a directory; give the export of a training (its export/ folder)"
        )
    if (directory / ADAPTER_CONFIG).exists():
        return _adapter(directory, head_rows)
    config = read_config(directory)
    found, prefix = _unwrapped(directory, tensors(directory))
    if head_rows:
        head = head_of_rows(directory, config, found, head_rows)
        kind: Kind = "causal_lm"
    else:
        head = find_head(directory, config, found)
        kind = _kind(directory, config, head)
        if kind != "remote_code":
            check_activation(directory, head)
    of_head = {f"{layer}.{part}" for layer in head.layers for part in ("weight", "bias")}
    dtype = widest(dtype for name, (_, dtype) in found.items() if name not in of_head)
    return Layout(kind, directory, directory, config, head, dtype, prefix)


def _unwrapped(directory: Path, found: Tensors) -> tuple[Tensors, str]:
    """The tensors without a wrapper's prefix, and that. Raises CheckpointError for none and for
    empty ones."""
    if not found:
        hint = pickle_hint(directory) or gguf_hint(directory)
        raise CheckpointError(f"{directory} holds no .safetensors weights{hint}")
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


def _kind(directory: Path, config: Mapping[str, Any], head: Head) -> Kind:
    import transformers

    architecture = architecture_of(config)
    if "value_head_prefix" in config or architecture in OPENRLHF_CLASSES:
        return "openrlhf"
    if architecture.endswith("ForSequenceClassification") and hasattr(transformers, architecture):
        return "hf"  # whatever code was beside it before `transformers` had the class
    if head.is_value_head:
        return "value_head"
    if head.activation is not None:
        return "hf"  # what its own code would compute is known
    name = code_reference(config)[1]
    if hasattr(transformers, name.split(".")[-1]):
        return "hf" if head.name in ("score", "classifier") else "openrlhf"
    _check_code_is_here(directory)
    return "remote_code"


def _check_code_is_here(directory: Path) -> None:
    """Raise CheckpointError if any of the code that would run lies in another repository."""
    for file in (directory / "config.json", directory / "tokenizer_config.json"):
        auto_map = json_object(file, CheckpointError).get("auto_map") if file.exists() else None
        references = json.dumps(auto_map)
        if "--" in references:
            raise CheckpointError(
                f"{file}: auto_map takes code from another repository ({references}); copy the "
                "code into the directory and name it there without a repository"
            )


def _adapter(directory: Path, head_rows: tuple[int, ...] = ()) -> Layout:
    """The layout of an adapter: its head is its own (`modules_to_save`, or the file of a value
    head), its base's, or made of rows of the base's."""
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
    value_head = directory / VALUE_HEAD
    beside = tensors(directory, [value_head]) if value_head.exists() else {}
    config = read_config(base)
    if quantisation(config) is not None:
        raise CheckpointError(
            f"{directory} is an adapter on quantised weights ({base}), into which it cannot be "
            f"merged; name the model that was quantised as base_model_name_or_path in "
            f"{ADAPTER_CONFIG}"
        )
    theirs, prefix = _unwrapped(base, tensors(base))
    if head_rows:
        head = head_of_rows(directory, config, theirs, head_rows)
    else:
        heads = {name: own[name] for name in (f"{head}.weight" for head in HEADS) if name in own}
        head = find_head(directory, config, beside or heads or theirs)
        check_activation(directory, head)
        if _kind(base, config, head) == "remote_code":
            raise CheckpointError(
                f"{directory} is an adapter on {base}, which needs Python code of its own. Convert "
                f"the base first (rayward convert {base} DST --trust-remote-code) and name DST as "
                f"base_model_name_or_path in {ADAPTER_CONFIG}"
            )
    embeddings = [shape[0] for name, (shape, _) in own.items() if is_embedding(name)]
    vocab_size = embeddings[0] if embeddings else None
    return Layout("peft", directory, base, config, head, "float32", prefix, vocab_size)


def _adapter_base(directory: Path) -> Path:
    """The directory that an adapter names as its base, from its own place or the current one."""
    name = json_object(directory / ADAPTER_CONFIG, CheckpointError).get("base_model_name_or_path")
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
