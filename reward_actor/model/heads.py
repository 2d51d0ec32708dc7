"""Where a reward model's head lies among its weights: found by names and shapes, nothing is read.

one linear layer      `score`, `classifier`, `value_head`, ..., or as `value_head_prefix` in
                      config.json says; `v_head.summary` of TRL and LLaMA-Factory
several with a        `score.0`, `score.2` (Qwen2.5-Math-RM, WorldPM, INF-ORM), `v_head.summary.0`,
ReLU between them     ... (GRM's `vhead_layer_type`); another activation where "head_activation" in
                      config.json says so
rows of the language  the logit of a token, or the difference of two (Nemotron, yes/no judges),
model's own head      where `rayward convert --head-rows` says so
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from reward_actor.model.directory import CheckpointError, Tensors, architecture_of, quantisation

HEADS = ("score", "classifier", "value_head", "v_head", "regression_head", "reward_head")
"""What the head is called, in files and as a module of a network."""

ACTIVATIONS = ("relu", "gelu", "silu", "tanh")
ACTIVATION_SETTING = "head_activation"

# Their own code, which need not run for it, has a ReLU between two linear layers.
_WITH_RELU = ("Qwen2ForRewardModel", "INFORMForSequenceClassification")

# What a language model's logits go through besides their head.
_OF_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling")


@dataclass(frozen=True)
class Head:
    """A head's linear layers as the weights name them, in the order in which they are applied.

    name         of the part that they belong to.
    num_outputs  of the last one.
    activation   what stands between them; None for one layer, and where the model's own code knows.
    rows         of the language model's head: one, or two whose difference counts; then no layers.
    """

    name: str
    layers: tuple[str, ...]
    num_outputs: int
    activation: str | None = None
    rows: tuple[int, ...] = ()

    @property
    def is_value_head(self) -> bool:
        """Whether it is TRL's `ValueHead`, whose class keeps it as `summary`."""
        return any(".summary" in layer for layer in self.layers)


# What sees in a network that reads images, too.
_VISION = re.compile(r"(^|\.)(visual|vision_tower|vision_model|vision_encoder)\.")


def find_head(directory: Path, config: Mapping[str, Any], found: Tensors) -> Head:
    """The one head among a model's tensors. Raises CheckpointError unless there is exactly one, on
    a body that reads text alone."""
    seeing = next((name for name in sorted(found) if _VISION.search(name)), None)
    if seeing is not None:
        raise CheckpointError(
            f"{directory} has a vision tower ({seeing}); this version scores text alone"
        )
    prefix = config.get("value_head_prefix")
    names = [prefix] if isinstance(prefix, str) and _layers(prefix, found) else []
    names = names or [name for name in HEADS if _layers(name, found)]
    if len(names) > 1:
        raise CheckpointError(
            f"{directory} has several heads ({', '.join(names)}); say which one scores: "
            '"value_head_prefix" in its config.json'
        )
    if not names:
        raise _without(directory, config, found)
    [name] = names
    layers = _layers(name, found)
    if any(found[f"{layer}.weight"][1] in ("I8", "U8") for layer in layers):
        raise CheckpointError(
            f"{directory}: its head is quantised, too; quantise the model with "
            f'llm_int8_skip_modules=["{name}"]'
        )
    others = [
        key
        for key in sorted(found)
        if key.startswith(f"{name}.") and key.rpartition(".")[0] not in layers
    ]
    if others:
        raise CheckpointError(
            f"{directory}: its head is not made of linear layers alone (it has {others[0]}), which "
            "this version does not know"
        )
    shapes = [found[f"{layer}.weight"][0] for layer in layers]
    for (outputs, _), (_, inputs) in pairwise(shapes):
        if outputs != inputs:
            raise CheckpointError(
                f"{directory}: the layers of its head do not follow one another "
                f"({', '.join(layers)} with shapes {shapes})"
            )
    activation = _activation(directory, config) if len(layers) > 1 else None
    return Head(name, layers, shapes[-1][0], activation)


def head_of_rows(
    directory: Path, config: Mapping[str, Any], found: Tensors, rows: tuple[int, ...]
) -> Head:
    """The head that is one row of the language model's, or the difference of two. Raises
    CheckpointError where there is no such row, or where logits are more than a product."""
    if quantisation(config) is not None:
        raise CheckpointError(
            f"{directory} has quantised weights, of whose head no rows can be taken; give the "
            "model that was quantised"
        )
    name = language_head(found)
    tied = config.get("tie_word_embeddings", architecture_of(config).endswith("ForCausalLM"))
    if name is None or (is_embedding(name) and not tied):
        raise CheckpointError(
            f"{directory} holds no head of a language model to take rows of: no lm_head.weight, "
            "nor embeddings that it is tied to (tie_word_embeddings in config.json)"
        )
    changed = [key for key in _OF_LOGITS if config.get(key) not in (None, 1, 1.0)]
    if changed:
        raise CheckpointError(
            f"{directory} changes its logits after the head ({changed[0]} in config.json), so that "
            "they are no rows of it"
        )
    num_rows = found[name][0][0]
    for row in rows:
        if not 0 <= row < num_rows:
            raise CheckpointError(f"{directory}: the head has {num_rows} rows, and none is {row}")
    return Head("lm_head", (), 1, rows=rows)


def language_head(found: Iterable[str]) -> str | None:
    """The name of a language model's head: lm_head's weights, or the embeddings that it is tied
    to."""
    names = ("lm_head.weight", "embed_out.weight")
    tables = [name for name in found if is_embedding(name)]
    return next((name for name in (*names, *tables) if name in found), None)


def is_embedding(name: str) -> bool:
    """Whether a weight is a whole table of input embeddings."""
    parts = name.split(".")
    is_table = any(part in ("embed_tokens", "wte", "word_embeddings", "embed_in") for part in parts)
    return is_table and parts[-1] == "weight" and "lora" not in name


def _layers(name: str, found: Tensors) -> tuple[str, ...]:
    """The linear layers of a part, by their places in it."""
    pattern = re.compile(rf"{re.escape(name)}(\.summary)?(?:\.(\d+))?\.weight")
    matches = [match for match in map(pattern.fullmatch, found) if match is not None]
    linear = [match for match in matches if len(found[match[0]][0]) == 2]
    linear.sort(key=lambda match: int(match[2] or 0))
    return tuple(match[0].removesuffix(".weight") for match in linear)


def _activation(directory: Path, config: Mapping[str, Any]) -> str | None:
    said = config.get(ACTIVATION_SETTING)
    if said is None:
        is_relu = architecture_of(config) in _WITH_RELU or "vhead_layer_type" in config
        return "relu" if is_relu else None
    if said not in ACTIVATIONS:
        raise CheckpointError(
            f"{directory / 'config.json'}: {ACTIVATION_SETTING} is {said!r}; it must be one of "
            f"{', '.join(ACTIVATIONS)}"
        )
    return str(said)


def check_activation(directory: Path, head: Head) -> None:
    """Raise CheckpointError where nothing says what stands between a head's layers."""
    if len(head.layers) > 1 and head.activation is None:
        raise CheckpointError(
            f"{directory}: its head has {len(head.layers)} layers ({', '.join(head.layers)}), and "
            f'nothing says what stands between them; write "{ACTIVATION_SETTING}" into its '
            f"config.json, one of {', '.join(ACTIVATIONS)}"
        )


def _without(directory: Path, config: Mapping[str, Any], found: Tensors) -> CheckpointError:
    """What is wrong with a directory that has no head of a known kind."""
    architecture = architecture_of(config) or "a network"
    nested = sorted(name for name in found if name.split(".")[0] in HEADS)
    others = nested[:1] or _heads_of_another_kind(set(found))
    if any(name.startswith("gating") for name in others):
        return CheckpointError(
            f"{directory} weights its outputs by what the prompt says, with a gating network "
            f"({architecture} with {', '.join(others)}), as ArmoRM, QRM and URM do; this version "
            "knows fixed weights only"
        )
    if others:
        return CheckpointError(
            f"{directory} has a head of a kind that this version does not know: {architecture} "
            f"with {', '.join(others)}. It knows linear layers, called {', '.join(HEADS)} or as "
            '"value_head_prefix" in config.json says'
        )
    # TRL saves one beside an adapter under the second name.
    is_adapter = (directory / "adapter_config.json").exists()
    pickles = ["value_head.bin", *(["pytorch_model.bin"] if is_adapter else [])]
    pickled = next((name for name in pickles if (directory / name).exists()), None)
    if pickled is not None:
        return CheckpointError(
            f"{directory} has its head in {pickled}, a pickle, which can run code when it is read; "
            "save v_head.summary.weight and .bias as value_head.safetensors"
        )
    rows = f"rayward convert {directory} DST --head-rows A, or A-B" if language_head(found) else ""
    return CheckpointError(
        f"{directory} has no trained reward head: {architecture} without any of "
        f"{', '.join(name + '.weight' for name in HEADS)}. Serving it would score with random "
        f"numbers. Train it first: rayward train --model.path {directory}"
        + (f"; or, if a token's logit is its reward: {rows}" if rows else "")
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
