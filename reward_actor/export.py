"""Writes a reward model's directory: equal rewards here, in `transformers` and in vLLM."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from reward_actor.atomic import replacing_directory
from reward_actor.contract import (
    FLOAT32_TOLERANCE,
    Golden,
    GoldenSample,
    ScoringContract,
    weight_files,
)
from reward_actor.golden import golden_samples
from reward_actor.json_files import json_object
from reward_actor.model.heads import ACTIVATION_SETTING
from reward_actor.model.manifest import write_manifest
from reward_actor.scorer import RewardScorer

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

# vLLM finds a network by the name of its class, and some families by another than `transformers`
# gives; `transformers` goes by model_type, so that either name serves it.
_VLLM_NAMES = {"Gemma3TextForSequenceClassification": "Gemma3ForSequenceClassification"}


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
    num_bytes = sum(weight.nbytes for weight in state_dict.values())
    with replacing_directory(directory, num_bytes) as staging:
        config.num_labels = len(contract.heads)
        config.id2label = dict(enumerate(contract.heads))
        config.label2id = {name: index for index, name in enumerate(contract.heads)}
        config.problem_type = "regression"  # without it vLLM puts a sigmoid on the reward
        config.pad_token_id = contract.pad_token_id
        config.use_cache = True
        network.config = config
        if getattr(network, "is_quantized", False):
            _copy_weights(Path(str(network.name_or_path)), staging)
            config.architectures = [type(network).__name__]
            config.save_pretrained(staging)
        else:
            network.save_pretrained(staging, state_dict=dict(state_dict))
        _name_class(staging / "config.json")
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
    return contract


def _copy_weights(source: Path, destination: Path) -> None:
    """As they are: `transformers` (5.19) cannot save again what it has loaded quantised."""
    for path in (*weight_files(source), source / "model.safetensors.index.json"):
        if path.exists():
            shutil.copyfile(path, destination / path.name)


def _name_class(config_file: Path) -> None:
    config = json_object(config_file)
    names = [_VLLM_NAMES.get(name, name) for name in config["architectures"]]
    if ACTIVATION_SETTING in config:
        # Not a class of `transformers`, and of vLLM for Qwen2 only: its classifiers hold one layer,
        # and would draw another head.
        names = [name.replace("ForSequenceClassification", "ForRewardModel") for name in names]
    config["architectures"] = names
    config_file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


# A right bfloat16 implementation lies about as far from the float32 score as the one that was
# measured; two of them lie at most twice that apart, and six samples do not show the worst case.
_SAFETY = 4.0
_HALF_FLOOR = 1e-3


def _load(directory: Path, device: str, dtype: str) -> RewardScorer:
    """The exported weights on the device, or on the CPU if the device has no room for them.

    Without a cache: a sample alone and the same one in a batch are compared.
    """

    def on(place: str) -> RewardScorer:
        return RewardScorer.from_pretrained(
            directory, place, dtype, check_golden=False, cache_size=0
        )

    try:
        return on(device)
    except torch.cuda.OutOfMemoryError:
        return on("cpu")


def record(directory: Path, contract: ScoringContract, device: str = "auto") -> ScoringContract:
    """Score the golden samples with the weights in `directory` and save the completed contract.

    Of several heads the expected raw score is the one that the contract's rule makes of them.
    float32 is held to 1e-5, unless alone and in a batch already differ by more here: then to four
    times that, with a warning. bfloat16, and float16 where the contract names it, is held to
    four times the largest difference between its scores (alone and in a batch) and the float32
    ones. Raises ValueError for scores that are not finite.
    """
    contract.save(directory)
    raw_scores: dict[str, np.ndarray] = {}
    tolerance = {}
    samples: list[GoldenSample] = []
    for dtype in dict.fromkeys(("float32", "bfloat16", contract.dtype)):
        scorer = _load(directory, device, dtype)
        samples = golden_samples(scorer.renderer)
        rows = [sample.input_ids for sample in samples]
        read = scorer.readout.read
        alone = read(np.concatenate([scorer.raw_scores([row]) for row in rows]))
        raw_scores[dtype] = alone.raw_scores
        apart = 0.0
        scale = np.maximum(1.0, np.abs(raw_scores["float32"]))
        for reading in (alone, read(scorer.raw_scores(rows))):
            scores = reading.raw_scores
            if not reading.finite.all():
                raise ValueError(
                    f"the golden samples score {scores.tolist()} in {dtype}: the weights are not "
                    "finite, so the export is not saved"
                )
            apart = max(apart, float(np.max(np.abs(scores - raw_scores["float32"]) / scale)))
        floor = FLOAT32_TOLERANCE if dtype == "float32" else _HALF_FLOOR
        exact = dtype == "float32" and apart <= floor
        tolerance[dtype] = floor if exact else max(floor, _SAFETY * apart)
        if dtype == "float32" and not exact:
            warnings.warn(
                f"float32 scores change by {apart:.2g} between a sample alone and in a batch; the "
                f"contract allows {tolerance[dtype]:.2g}",
                stacklevel=2,
            )
    golden = Golden(
        samples=samples,
        raw_scores={dtype: scores.tolist() for dtype, scores in raw_scores.items()},
        tolerance=tolerance,
    )
    complete = replace(contract, golden=golden)
    complete.save(directory)
    return complete
