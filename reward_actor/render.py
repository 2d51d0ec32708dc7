"""Prompt and completion to token ids: the only place where text becomes tokens."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from reward_actor import conversation
from reward_actor.contract import ScoringContract, sha256_text
from reward_actor.groups import (
    Completion,
    Group,
    Message,
    Prompt,
    Rendered,
    SampleError,
    Whole,
)
from reward_actor.prompts import PromptFormat, PromptRenderer, checked_unicode
from reward_actor.prompts import RenderError as RenderError
from reward_actor.prompts import Sample as Sample
from reward_actor.token_ids import checked, common_prefix, cut, with_end, with_eos, with_last
from reward_actor.turns import lost, shape

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Stands for a completion while a template is examined. Plain letters: no template treats them
# specially, and a template that trims its content leaves them whole.
SENTINEL = "completionsentinel"


_SHAPES_KEPT = 10_000


class Renderer:
    """A tokenizer under a scoring contract. Safe to share between threads."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, contract: ScoringContract) -> None:
        self.tokenizer = tokenizer
        self.contract = contract
        self.prompts = PromptRenderer(tokenizer, PromptFormat.of(contract))
        self._lost: dict[str, str | None] = {}

    def render(
        self,
        prompt: Prompt,
        completion: Completion,
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        template_args: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The whole sequence's token ids, unchecked for length. Raises RenderError.

        Under "chat" a string prompt is one user message; under "text" it is a prefix. `tools` and
        `template_args` go to the chat template, over the contract's, and are an error under "text".
        """
        sample = Sample(prompt, completion, tools, template_args or {})
        [ids] = self.render_many([sample])
        if isinstance(ids, RenderError):
            raise ids
        return ids

    def render_many(self, samples: Sequence[Sample]) -> list[list[int] | RenderError]:
        """What `render` returns or raises for each sample, bit for bit, in fewer calls of the
        tokenizer: one for a thousand texts."""
        return self._ids_of([_or_error(self._to_text, sample) for sample in samples])

    def _ids_of(self, texts: Sequence[str | RenderError]) -> list[list[int] | RenderError]:
        encoded = iter(self.prompts.encode_many([text for text in texts if isinstance(text, str)]))
        found = [next(encoded) if isinstance(text, str) else text for text in texts]
        return [
            with_last(with_eos(ids, self.contract), self.contract) if isinstance(ids, list) else ids
            for ids in found
        ]

    def prompt_ids(
        self,
        prompt: Prompt,
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        template_args: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """What a policy continues, as `PromptRenderer.prompt_ids`."""
        return self.prompts.prompt_ids(prompt, tools=tools, template_args=template_args)

    def sequences(self, group: Group | Whole) -> list[Rendered]:
        """The token ids of each sample, or why it cannot be scored: of each completion with its
        prompt, or of each whole sequence."""
        if isinstance(group, Whole):
            return self._whole(group)
        if group.prompt_ids is not None:
            prompt_ids, contract = list(group.prompt_ids), self.contract
            return [
                checked(with_end([*prompt_ids, *ids], contract), contract)
                for ids in group.completion_ids
            ]
        assert group.prompt is not None
        try:
            asked = self.prompts.read(Sample(group.prompt, "", group.tools, group.template_args))
        except RenderError as error:
            return [SampleError("unrenderable", str(error))] * len(group)
        answered = [replace(asked, completion=said) for said in group.completions]
        return [
            checked(ids, self.contract)
            if isinstance(ids, list)
            else SampleError("unrenderable", str(ids))
            for ids in self._ids_of([_or_error(self._framed, sample) for sample in answered])
        ]

    def num_prompt_tokens(
        self, group: Group | Whole, rendered: Sequence[Rendered]
    ) -> list[int] | None:
        """How many tokens of each rendered sample of `group` are its prompt's: what it shares with
        the prompt that a policy continues. None for whole sequences, whose prompt is unknown."""
        if isinstance(group, Whole):
            return None
        if group.prompt_ids is not None:
            prompt = list(group.prompt_ids)
        else:
            assert group.prompt is not None
            try:
                prompt = self.prompt_ids(
                    group.prompt, tools=group.tools, template_args=group.template_args
                )
            except RenderError:  # a prompt that no policy could continue
                prompt = []
        return [
            0 if isinstance(ids, SampleError) else common_prefix(prompt, ids) for ids in rendered
        ]

    def is_templated(self, text: str) -> bool:
        """Whether a text went through the chat template already: it begins as that begins."""
        return self.prompts.is_chat and any(text.startswith(start) for start in self._beginnings)

    @cached_property
    def _beginnings(self) -> list[str]:
        """What conversations begin with: control tokens, or all that is written before the first
        content; and the same without a BOS, which many senders omit."""
        turn = {"role": "user", "content": SENTINEL}
        special = [str(t) for t in self.tokenizer.added_tokens_decoder.values() if t.special]
        control = re.compile(f"(?:{'|'.join(map(re.escape, special))})*" if special else "")
        bos = self.tokenizer.bos_token or ""
        found: set[str] = set()
        for messages in ([turn], [{**turn, "role": "system"}, turn]):
            with contextlib.suppress(RenderError):  # not every template has a system turn
                start = self.prompts.apply_template(messages, generation=True).partition(SENTINEL)[
                    0
                ]
                begins = control.match(start)
                run = begins[0] if begins is not None else ""
                start = run if run.removeprefix(bos) else start
                found |= {start, start.removeprefix(bos)}
        return [text for text in found if text.strip()]

    def _whole(self, whole: Whole) -> list[Rendered]:
        if whole.ids:
            return [cut(list(ids), whole, self.contract) for ids in whole.ids]
        texts: list[str | SampleError] = []
        for text in whole.texts:
            try:
                texts.append(checked_unicode(self._without_rest(text)))
            except RenderError as error:
                texts.append(SampleError("unrenderable", str(error)))
        good = [text for text in texts if isinstance(text, str)]
        encoded = iter(self.prompts.encode_plain(good, whole.add_special_tokens))
        return [
            cut(with_eos(next(encoded), self.contract), whole, self.contract)
            if isinstance(text, str)
            else text
            for text in texts
        ]

    def _without_rest(self, text: str) -> str:
        """Without what the template writes after the end of the last turn; see `_chat`."""
        end = self.contract.turn_end
        if not self.prompts.is_chat or self.contract.end_text is not None:
            return text
        if not end:
            return text.rstrip()
        rest = self._suffix.rpartition(end)[2]
        return text.removesuffix(rest) if text.endswith(end + rest) else text

    @cached_property
    def _suffix(self) -> str:
        """What the template writes after a completion."""
        turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": SENTINEL}]
        return self.prompts.apply_template(turns, generation=False).rpartition(SENTINEL)[2]

    def _to_text(self, sample: Sample) -> str:
        return self._framed(self.prompts.read(sample))

    def _framed(self, sample: Sample) -> str:
        """The text of a sample that was read, except its completion."""
        try:
            completion = conversation.completion(sample.completion, "completion")
        except ValueError as error:
            raise RenderError(str(error)) from error
        if not isinstance(sample.prompt, str):
            return checked_unicode(self._chat(sample, [*sample.prompt, said(completion)]))
        if not isinstance(completion, str):
            raise RenderError("a completion with more than text needs a chat contract")
        return checked_unicode(self._with_end_text(sample.prompt + completion))

    def _chat(self, sample: Sample, messages: Sequence[Message]) -> str:
        text = self._written(messages, sample, sample.tools)
        self._check_nothing_is_lost(messages, sample)
        return self._ended(text)

    def text_of(self, messages: Sequence[Message], sample: Sample) -> str:
        """Messages as they are scored, told what a sample that was read tells the template."""
        return self._ended(self._written(messages, sample, sample.tools))

    def _written(
        self, messages: Sequence[Message], sample: Sample, tools: Sequence[Mapping[str, Any]]
    ) -> str:
        """Messages in the chat template, told what the sample tells it."""
        return self.prompts.apply_template(
            messages, generation=False, tools=tools, arguments=sample.template_args
        )

    def _ended(self, text: str) -> str:
        """A conversation as the template writes it, up to the end of its last turn."""
        end = self.contract.turn_end
        if self.contract.end_text is not None and text.endswith(self._suffix):
            text = text.removesuffix(self._suffix)
            return text + end + self.contract.end_text if end else self._with_end_text(text)
        # Templates close a turn with more than its end token (a newline, say); a policy stops at
        # the token, and the pooled token must be the same one.
        if not end:
            return text.rstrip()
        cut = text.rfind(end)
        if cut < 0:
            raise RenderError(f"the chat template did not end the completion with {end!r}")
        return text[: cut + len(end)] + (self.contract.end_text or "")

    def _with_end_text(self, text: str) -> str:
        """A text that no template ends, with the contract's end."""
        end = self.contract.end_text
        if not end:
            return text
        text = text.rstrip("\n")
        eos = self.tokenizer.eos_token
        return text if eos and text.endswith(eos) else text + end

    def _check_nothing_is_lost(self, messages: Sequence[Message], sample: Sample) -> None:
        """Raise RenderError if the template leaves a part out; it is asked once for each shape."""
        arguments = sample.template_args
        # A digest: keys are a sender's, and may be of any length.
        messages = self.prompts.parsed(messages)
        told = json.dumps(arguments, default=str)  # a template may do as they say
        key = sha256_text(shape([*messages, {"tools": list(sample.tools)}]) + told)
        try:
            found = self._lost[key]
        except KeyError:
            try:
                found = lost(
                    messages,
                    sample.tools,
                    # Without a call that ends with another token.
                    lambda marked, tools: self._ended(self._written(marked, sample, tools)),
                )
            except RenderError:  # it reads contents, and these are ours
                found = None
            if len(self._lost) >= _SHAPES_KEPT:
                self._lost.clear()
            self._lost[key] = found
        if found is not None:
            raise RenderError(
                f"the chat template leaves out {found}, or writes it behind the turn's end; use "
                "the roles and fields that it was made for"
            )


def said(completion: Completion) -> Message:
    """The turn that is scored, as a message."""
    if isinstance(completion, str):
        return {"role": "assistant", "content": completion}
    return completion


def _or_error(write: Callable[[Sample], str], sample: Sample) -> str | RenderError:
    try:
        return write(sample)
    except RenderError as error:
        return error
