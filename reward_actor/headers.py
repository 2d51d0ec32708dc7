"""What a model's directory holds, read without its weights: config.json, names, shapes, dtypes."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from reward_actor.contract import weight_files

PICKLED_WEIGHTS = "pytorch_model.bin"

# What DeepSpeed-Chat calls the body inside its reward model: as it was spelled for most of its life
# and as it is since; v_head.weight is the head.
BODY_PREFIXES = ("rwtranrsformer.", "rwtransformer.")

HEADS = ("score", "classifier", "value_head", "v_head", "regression_head", "reward_head")

_DTYPES = {"BF16": "bfloat16", "F16": "float16"}

_LARGEST_PICKLE_BYTES = 64 * 2**20


class CheckpointError(ValueError):
    """This directory cannot be served; the message says what to do."""


def read_config(directory: Path) -> dict[str, Any]:
    """config.json. Raises CheckpointError where it is missing or not a JSON object."""
    path = directory / "config.json"
    if not path.exists():
        hint = "; did you mean its export/ folder?" if (directory / "export").is_dir() else ""
        raise CheckpointError(f"{directory} holds no config.json, so no model{hint}")
    return json_object(path)


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
            if entry.filename.endswith("data.pkl") and entry.file_size <= _LARGEST_PICKLE_BYTES:
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
