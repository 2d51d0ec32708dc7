"""The policy's side of a rollout: how its prompts become token ids, and how long they are."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from reward_actor.groups import Group, SampleError
from reward_actor.model.inferred import contract_for, longest_of
from reward_actor.model.tokenizer import chat_template_of, load_tokenizer
from reward_actor.prompts import PromptFormat, PromptRenderer
from reward_actor.render import Renderer, RenderError
from reward_actor.rollout.records import Question, RolloutGroup, Sampling, asked

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor
    from transformers import PretrainedConfig

    from reward_actor.contract import Rendering

# A state_dict has them even where they are those of the embedding, which a file says once.
_TIED = {"lm_head.weight"}


@dataclass(frozen=True)
class Policy:
    """A policy's directory, without its weights."""

    prompts: PromptRenderer
    config: PretrainedConfig
    max_length: int

    @classmethod
    def load(cls, directory: str) -> Policy:
        """Raises ValueError for a policy that is not there."""
        from transformers import AutoConfig

        if not (Path(directory) / "config.json").exists():
            raise ValueError(f"{directory} holds no config.json, so no policy to sample from")
        tokenizer = load_tokenizer(Path(directory))
        config = AutoConfig.from_pretrained(directory)
        template = chat_template_of(tokenizer)
        format = PromptFormat(
            format="chat" if template else "text",
            chat_template=template,
            template_date=_today() if template and "strftime_now" in template else None,
            add_special_tokens=not template,
            plain_content=bool(template),
            parse_arguments=bool(template),
        )
        prompts = PromptRenderer(tokenizer, format)
        return cls(prompts, config, longest_of(tokenizer, config))

    def prompt_ids(self, question: Group) -> list[int]:
        """What the policy continues. Raises RenderError."""
        assert question.prompt is not None
        return self.prompts.prompt_ids(
            question.prompt, tools=question.tools, template_args=question.template_args
        )

    def as_scored(self, rendering: Rendering) -> Renderer:
        """What a scorer with the same tokenizer and template renders as. Raises ValueError for a
        policy that no reward model could be made of."""
        format = self.prompts.format
        tokenizer = self.prompts.tokenizer
        contract = contract_for(tokenizer, self.config, format=format.format)
        contract = replace(contract, **vars(rendering), template_date=format.template_date)
        return Renderer(tokenizer, contract)


def _today() -> str:
    return date.today().isoformat()


def longest_needed(policy: Policy, prompts: Sequence[Question], sampling: Sampling) -> int:
    """Tokens that the longest prompt and its completion can take, at most what the policy takes.

    An engine of that length spares the memory of a long-context model's full length.
    """
    longest = 0
    for prompt in prompts:
        with contextlib.suppress(RenderError):  # becomes this prompt's error when it is sampled
            longest = max(longest, len(policy.prompt_ids(asked(prompt))))
    return min(longest + sampling.max_tokens, policy.max_length)


def check_weights(directory: str, weights: str) -> None:
    """Raise ValueError unless the weights of a directory have the names and shapes of those of a
    policy's directory, both in safetensors."""
    _check_shapes(directory, _shapes(weights), weights)


def as_safetensors(directory: str, weights: Mapping[str, Tensor]) -> NDArray[np.uint8]:
    """The bytes of a file with these tensors, which Ray carries without a copy. Raises ValueError
    unless they have the names and shapes of a policy's directory."""
    from safetensors.torch import save

    given = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    _check_shapes(directory, given, "these weights")
    chosen = {name: weights[name].detach().cpu().contiguous() for name in _shapes(directory)}
    places = [tensor.data_ptr() for tensor in chosen.values()]
    for name, tensor in chosen.items():
        if places.count(tensor.data_ptr()) > 1:  # tied, which a file cannot say
            chosen[name] = tensor.clone()
    return np.frombuffer(save(chosen), np.uint8)


def _check_shapes(directory: str, given: Mapping[str, tuple[int, ...]], where: str) -> None:
    expected = _shapes(directory)
    for name, shape in expected.items():
        if name not in given:
            raise ValueError(f"{where}: no {name}, which {directory} has")
        if given[name] != shape:
            raise ValueError(f"{where}: {name} is {given[name]}; the policy's is {shape}")
    if unknown := sorted(given.keys() - expected.keys() - _TIED):
        raise ValueError(f"{where}: {unknown[0]}, which {directory} does not have")


def _shapes(directory: str) -> dict[str, tuple[int, ...]]:
    from safetensors import SafetensorError, safe_open

    files = sorted(Path(directory).glob("*.safetensors"))
    if not files:
        raise ValueError(f"{directory} holds no weights in safetensors")
    found: dict[str, tuple[int, ...]] = {}
    for file in files:
        try:
            with safe_open(file, "numpy") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (it is no mapping)
                    found[name] = tuple(tensors.get_slice(name).get_shape())
        except SafetensorError as error:
            raise ValueError(f"{file} cannot be read: {error}") from error
    return found


def group_to_score(rollout: RolloutGroup, renderer: Renderer) -> Group:
    """What a scorer that renders as `renderer` does is sent of a rollout: its token ids where they
    are what the prompt and the completions render to, otherwise its text.

    They are not where a template changes a completion (Qwen3 writes a think block before it, Llama
    3 trims it) or a policy sampled tokens that the tokenizer would not choose for the same text. A
    completion that was cut by its length is scored as if its turn had ended there, either way.
    """
    text = rollout.as_text()
    completion_ids = []
    for rendered, sampled in zip(renderer.sequences(text), rollout.completion_ids, strict=True):
        given = [*rollout.prompt_ids, *sampled]
        if isinstance(rendered, SampleError) or rendered[: len(given)] != given:
            return text
        completion_ids.append(rendered[len(rollout.prompt_ids) :])
    return Group(prompt_ids=rollout.prompt_ids, completion_ids=completion_ids)
