"""What a policy continues: a prompt in its chat template, as token ids. No scoring contract."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from typing import TYPE_CHECKING, Any, Literal

from reward_actor import conversation
from reward_actor.contract import ScoringContract, check_arg_names
from reward_actor.groups import Completion, Message, Prompt
from reward_actor.spellings import SpellingError, Spellings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class RenderError(ValueError):
    """This prompt and completion cannot be rendered under the contract."""


# What expressions of a template raise over values that it was not made for.
OF_A_TEMPLATE = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)
_TEXTS_PER_CALL = 1000


@dataclass(frozen=True)
class Sample:
    """What is rendered: a prompt, a completion, and what else the chat template is given."""

    prompt: Prompt
    completion: Completion
    tools: Sequence[Mapping[str, Any]] = ()
    template_args: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class PromptFormat:
    """How prompts become text. The fields are those of `ScoringContract` with the same names."""

    format: Literal["chat", "text"]
    chat_template: str | None = None
    template_date: str | None = None
    template_args: Mapping[str, Any] = field(default_factory=dict)
    add_special_tokens: bool = False
    plain_content: bool = False
    parse_arguments: bool = False

    @classmethod
    def of(cls, contract: ScoringContract) -> PromptFormat:
        return cls(
            format=contract.format,
            chat_template=contract.chat_template,
            template_date=contract.template_date,
            template_args=contract.template_args,
            add_special_tokens=contract.add_special_tokens,
            plain_content=contract.plain_content,
            parse_arguments=contract.parse_arguments,
        )


class PromptRenderer:
    """A tokenizer with a chat template and its date. Safe to share between threads."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, format: PromptFormat) -> None:
        self.tokenizer = tokenizer
        self.format = format
        self._spellings = Spellings(tokenizer) if format.plain_content else None

    @property
    def is_chat(self) -> bool:
        return self.format.format == "chat"

    def use_date(self, day: str | None) -> None:
        """Write this date where the template writes one: a policy's prompts follow its scorer's."""
        if self.format.template_date is not None and day is not None:
            self.format = replace(self.format, template_date=day)

    def prompt_ids(
        self,
        prompt: Prompt,
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        template_args: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """What a policy continues: the prompt with the generation prompt of its template.

        Under "chat" a string is one user message. Raises RenderError.
        """
        sample = self.read(Sample(prompt, "", tools, template_args or {}))
        if isinstance(sample.prompt, str):
            return self.encode(sample.prompt)
        text = self.apply_template(
            sample.prompt,
            generation=True,
            tools=sample.tools,
            arguments=sample.template_args,
        )
        return self.encode(text)

    def read(self, sample: Sample) -> Sample:
        """The sample as `reward_actor.conversation` reads it, and as this contract allows: with
        messages under "chat", with text alone under "text"."""
        if not self.is_chat:
            if not isinstance(sample.prompt, str):
                raise RenderError("a list of messages needs a chat contract; this one is 'text'")
            told = (("tools", sample.tools), ("template arguments", sample.template_args))
            for name, value in told:
                if value:
                    raise RenderError(f"{name} need a chat contract; this one is 'text'")
            return sample
        try:
            prompt = conversation.messages(conversation.as_messages(sample.prompt), "prompt")
            tools = conversation.tools(sample.tools, "tools")
            arguments = conversation.template_args(sample.template_args, "chat_template_kwargs")
            check_arg_names(arguments)
        except ValueError as error:
            raise RenderError(str(error)) from error
        return Sample(prompt, sample.completion, tools, arguments)

    def apply_template(
        self,
        messages: Sequence[Message],
        *,
        generation: bool,
        tools: Sequence[Mapping[str, Any]] = (),
        arguments: Mapping[str, Any] | None = None,
    ) -> str:
        """What the chat template makes of messages. Raises RenderError."""
        from jinja2 import TemplateError

        described: Any = [dict(tool) for tool in tools] or None
        arguments = {**self.format.template_args, **(arguments or {})}
        try:
            described, arguments = self._hidden(described), self._hidden(arguments)
        except SpellingError as error:
            raise RenderError(str(error)) from error

        def write(turns: list[dict[str, Any]]) -> Any:
            return self.tokenizer.apply_chat_template(
                self._hidden(turns),
                tools=described,
                chat_template=self.format.chat_template,
                tokenize=False,
                add_generation_prompt=generation,
                **clock(self.format.template_date),
                **arguments,
            )

        try:
            try:
                text = write(self.parsed(messages))
            except TypeError:  # DeepSeek's templates join the arguments of a call to text
                text = write([conversation.with_text_arguments(turn) for turn in messages])
        except SpellingError as error:
            raise RenderError(str(error)) from error
        except (TemplateError, *OF_A_TEMPLATE) as error:
            raise RenderError(f"the chat template refuses these messages: {error}") from error
        assert isinstance(text, str)
        return text

    def parsed(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """The messages with the arguments of their calls as the contract says."""
        if not self.format.parse_arguments:
            return [dict(message) for message in messages]
        return [conversation.with_parsed_arguments(message) for message in messages]

    def _hidden(self, value: Any) -> Any:
        """The value with the special tokens that it spells hidden, where they are text."""
        return value if self._spellings is None else self._spellings.hidden(value)

    def encode(self, text: str) -> list[int]:
        """The ids of a text that the template wrote. Raises RenderError."""
        [ids] = self.encode_many([checked_unicode(text)])
        if isinstance(ids, RenderError):
            raise ids
        return ids

    def encode_many(self, texts: Sequence[str]) -> list[list[int] | RenderError]:
        """The ids of texts that the template or, under "text", their sender wrote."""
        spelled: dict[int, list[int] | RenderError] = {}
        if self.is_chat and self._spellings is not None:
            for index, text in enumerate(texts):
                if self._spellings.is_hidden_in(text):
                    try:
                        spelled[index] = self._spellings.encode(text)
                    except SpellingError as error:
                        spelled[index] = RenderError(str(error))
        rest = [text for index, text in enumerate(texts) if index not in spelled]
        encoded = iter(self.encode_plain(rest, self.format.add_special_tokens))
        return [spelled[i] if i in spelled else next(encoded) for i in range(len(texts))]

    def encode_plain(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        """The ids of texts whose special tokens are tokens."""
        encoded: list[list[int]] = []
        for first in range(0, len(texts), _TEXTS_PER_CALL):
            encoded += self.tokenizer(
                list(texts[first : first + _TEXTS_PER_CALL]),
                add_special_tokens=add_special_tokens,
                return_attention_mask=False,
            )["input_ids"]
        return encoded


def checked_unicode(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        # A lone surrogate is a legal Python (and JSON) string without a UTF-8 form.
        raise RenderError("the text is not valid Unicode") from error
    return text


def clock(day: str | None) -> dict[str, Any]:
    """What makes a template that writes the date write this one, today and next year."""
    if day is None:
        return {}
    return {"strftime_now": date.fromisoformat(day).strftime}
