"""What the files of a model's directory say: config.json, and the headers of safetensors files.

Nothing here reads weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from reward_actor.contract import weight_files
from reward_actor.json_files import json_object

_DTYPES = {"BF16": "bfloat16", "F16": "float16"}


Tensors = dict[str, tuple[list[int], str]]
"""Shape and dtype by name."""


class CheckpointError(ValueError):
    """This directory cannot be served; the message says what to do."""


def read_config(directory: Path) -> dict[str, Any]:
    """config.json. Raises CheckpointError where it is missing or not a JSON object."""
    path = directory / "config.json"
    if not path.exists():
        hint = "; did you mean its export/ folder?" if (directory / "export").is_dir() else ""
        hint = gguf_hint(directory) or hint
        raise CheckpointError(f"{directory} holds no config.json, so no model{hint}")
    config = json_object(path, CheckpointError)
    method = quantisation(config)
    if method not in (None, "bitsandbytes"):
        raise CheckpointError(
            f"{directory} holds quantised weights ({method} in its config.json), of which this "
            "version reads those of bitsandbytes only; give the model that was quantised, or save "
            "it with whole weights (model.dequantize())"
        )
    if method is not None and find_spec(method) is None:
        raise CheckpointError(
            f'{directory} holds weights that bitsandbytes quantised: pip install "rayward[peft]"'
        )
    return config


def gguf_hint(directory: Path) -> str:
    """A clause about weights that llama.cpp reads; or nothing."""
    if not any(directory.glob("*.gguf")):
        return ""
    return "; GGUF files are llama.cpp's: give the model that they were made of"


def quantisation(config: Mapping[str, Any]) -> str | None:
    """The method by which a configuration says that its weights are quantised, or None."""
    settings = config.get("quantization_config")
    if not settings:
        return None
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    return str(method or "quantization_config")


def tensors(directory: Path, files: Iterable[Path] | None = None) -> Tensors:
    """Shape and dtype of every tensor in the directory's safetensors files, from their headers."""
    if files is None:
        files = weight_files(directory)
        index = directory / "model.safetensors.index.json"
        shards = json_object(index, CheckpointError).get("weight_map", {}) if index.exists() else {}
        if not isinstance(shards, dict):
            raise CheckpointError(f"{index}: weight_map is not an object of names and files")
        for shard in shards.values():
            if Path(str(shard)).name != shard:
                raise CheckpointError(f"{index} names weights outside its directory: {shard!r}")
    found: Tensors = {}
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
