"""What clients of vLLM send to its pooling server, and what of it is refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator

from reward_actor import conversation, schema
from reward_actor.groups import Group, Whole
from serve.protocols.drop_in import DropIn, shape_of
from serve.protocols.messages import LenientMessage, as_messages

_OF_MESSAGES = (
    "tools",
    "chat_template_kwargs",
    "chat_template",
    "add_generation_prompt",
    "continue_final_message",
)

_TEMPLATED = "<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>"


def _as_samples(value: Any) -> Any:
    """A single text or sequence of ids as a list of one."""
    return [value] if shape_of(value) in ("text", "ids") else value


Samples = Annotated[
    Annotated[list[str], Field(min_length=1), Tag("texts")]
    | Annotated[list[list[schema.TokenId]], Field(min_length=1), Tag("rows")],
    Discriminator(shape_of),
    BeforeValidator(
        _as_samples,
        json_schema_input_type=str | list[str] | list[schema.TokenId] | list[list[schema.TokenId]],
    ),
]


class VllmRequest(DropIn):
    """`input` (texts or token ids) or `messages` (one conversation, with `tools`).

    Texts are templated by their sender; the tokenizer adds its special tokens unless
    `add_special_tokens` is false. `truncate_prompt_tokens`: longer samples are cut (-1: to what the
    model takes), from the right unless `truncation_side` is "left".
    """

    model: str | None = None
    input: Samples | None = None
    messages: Annotated[list[LenientMessage], Field(min_length=1)] | None = None
    add_special_tokens: bool | None = None
    use_activation: bool | None = None
    activation: bool | None = Field(None, description="use_activation as older clients call it")
    truncate_prompt_tokens: Annotated[int, Field(ge=-1)] | None = None
    truncation_side: Literal["left", "right"] | None = None
    encoding_format: Literal["float", "base64"] = "float"
    add_generation_prompt: bool = False
    continue_final_message: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"input": [_TEMPLATED], "use_activation": False},
                {"input": [[5, 6, 7], [5, 8]]},
                {
                    "messages": [
                        {"role": "user", "content": "Hi."},
                        {"role": "assistant", "content": "Hello!"},
                    ]
                },
            ]
        }
    )

    @model_validator(mode="after")
    def _input_or_messages(self) -> VllmRequest:
        if (self.input is None) == (self.messages is None):
            raise ValueError("give input or messages, not both")
        return self

    @model_validator(mode="after")
    def _whole_input(self) -> VllmRequest:
        for name in _OF_MESSAGES if self.messages is None else ():
            if getattr(self, name):
                raise ValueError(
                    f"{name} cannot be set with input, which its sender has templated; give "
                    "messages"
                )
        return self

    @model_validator(mode="after")
    def _whole_conversation(self) -> VllmRequest:
        if self.messages is None:
            return self
        last = self.messages[-1]
        calls = (last.model_extra or {}).get("tool_calls")
        if last.role != "assistant" or (last.content is None and not calls):
            raise ValueError(
                "the last of the messages must be the assistant's, with content or a call: its "
                "reward is what is answered"
            )
        conversation.answered(as_messages(self.messages), "messages")  # raises for `to_group`
        refused = {
            "add_generation_prompt": "a completion is scored, and none would follow",
            "continue_final_message": "a reward is read at the end of its turn",
            "chat_template": "the model is scored with the one that it was trained with",
            "add_special_tokens": "the chat template writes those that the model was trained with",
        }
        for name, reason in refused.items():
            if getattr(self, name):
                raise ValueError(f"{name} cannot be set with messages: {reason}")
        if self.truncate_prompt_tokens not in (None, -1):
            raise ValueError(
                "truncate_prompt_tokens cannot be set with messages: a reward is read at the end "
                "of its turn, so a conversation that is too long is an error"
            )
        return self

    @property
    def is_activated(self) -> bool:
        asked = self.activation if self.use_activation is None else self.use_activation
        return bool(asked)


class VllmPoolingRequest(VllmRequest):
    """As for /classify; `task` "token_classify" asks for a value of every token."""

    task: Literal["classify", "token_classify"] | None = None

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"input": [_TEMPLATED], "task": "classify"},
                {"input": [[5, 6, 7]], "task": "token_classify"},
            ]
        }
    )


def to_group(request: VllmRequest) -> Group | Whole:
    if request.messages is not None:
        prompt, completion = conversation.answered(as_messages(request.messages), "messages")
        return Group(
            prompt,
            [completion],
            template_args=request.chat_template_kwargs or {},
            tools=request.tools or (),
        )
    assert request.input is not None
    asked = request.truncate_prompt_tokens
    max_tokens: int | Literal["model"] | None = "model" if asked == -1 else asked
    keep: Literal["left", "right"] = "right" if request.truncation_side == "left" else "left"
    if shape_of(request.input) == "rows":
        return Whole(ids=request.input, max_tokens=max_tokens, keep=keep)  # type: ignore[arg-type]
    adds = request.add_special_tokens is not False
    return Whole(request.input, add_special_tokens=adds, max_tokens=max_tokens, keep=keep)  # type: ignore[arg-type]
