"""The wire types of the native HTTP protocol, and the one vocabulary of error types.

Every model refuses unknown fields; NaN and infinity are refused on the way in and cannot occur on
the way out (a non-finite reward is a per-sample error).
"""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WrapValidator,
    create_model,
    model_validator,
)

from reward_actor.contract import Rendering
from reward_actor.conversation import joined
from reward_actor.errors import ErrorType
from reward_actor.groups import GroupScores
from reward_actor.readout import Readout

HTTP_STATUS: dict[str, int] = {
    "invalid_request": 422,
    "body_too_large": 413,
    "too_many_tokens": 413,
    "unauthenticated": 401,
    "forbidden": 403,
    "not_found": 404,
    "model_refused": 409,
    "overloaded": 429,
    "deadline_exceeded": 504,
    "unavailable": 503,
    "asleep": 503,
    "internal": 500,
}
RETRYABLE = frozenset({"overloaded", "deadline_exceeded", "unavailable", "asleep", "internal"})

TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class Wire(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class TextPart(Wire):
    type: Literal["text"]
    text: str


def _joined(content: Any) -> Any:
    return joined(content) if isinstance(content, list) else content


Content = Annotated[
    str | None, BeforeValidator(_joined, json_schema_input_type=str | list[TextPart] | None)
]
"""Parts of text become one, with newlines between them."""

Role = Annotated[str, Field(min_length=1, max_length=64)]


class ChatMessage(Wire):
    """One turn, with all that training renders of it. A null content is for turns that call."""

    role: Role
    content: Content = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None

    @model_validator(mode="after")
    def _says_something(self) -> ChatMessage:
        if self.content is None and not self.tool_calls:
            raise ValueError("content is null, and the message calls no tool")
        return self

    def as_message(self) -> dict[str, Any]:
        """As it is rendered."""
        known = {name: value for name, value in self if value is not None and value != []}
        return {**known, "content": self.content or ""}


def _text_or_messages(value: Any, messages: Any) -> Any:
    return value if isinstance(value, str) else messages(value)


if TYPE_CHECKING:
    PromptField = str | list[ChatMessage]
else:
    # Not a union, whose complaints would be those of both shapes, under the names of both.
    PromptField = Annotated[
        list[ChatMessage],
        WrapValidator(_text_or_messages, json_schema_input_type=str | list[ChatMessage]),
    ]


class CompletionMessage(ChatMessage):
    """The turn that is scored, where it is more than a text: the assistant's."""

    role: Literal["assistant"]


if TYPE_CHECKING:
    CompletionField = str | CompletionMessage
else:
    CompletionField = Annotated[
        CompletionMessage,
        WrapValidator(_text_or_messages, json_schema_input_type=str | CompletionMessage),
    ]


class GroupRequest(Wire):
    """One prompt with its completions: text or messages (`prompt`, `completions`) or token ids
    (`prompt_ids`, `completion_ids`); or whole sequences (`texts`) that their sender has put into
    the model's chat template already. `tools` and `chat_template_kwargs` go to the chat template of
    a prompt."""

    prompt: PromptField | None = None
    completions: list[CompletionField] | None = None
    prompt_ids: list[TokenId] | None = None
    completion_ids: list[list[TokenId]] | None = None
    texts: list[str] | None = None
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> GroupRequest:
        text = (self.prompt is not None, self.completions is not None)
        ids = (self.prompt_ids is not None, self.completion_ids is not None)
        both, none = (True, True), (False, False)
        if (text, ids, self.texts is not None) not in (
            (both, none, False),
            (none, both, False),
            (none, none, True),
        ):
            raise ValueError(
                "give prompt and completions, or prompt_ids and completion_ids, or texts, not a "
                "mixture"
            )
        if self.prompt is None and (self.tools or self.chat_template_kwargs):
            raise ValueError("tools and chat_template_kwargs go with a prompt")
        return self


class ScoreRequest(Wire):
    groups: list[GroupRequest]
    model: str | None = None
    token_rewards: bool = False
    turn_rewards: bool = False

    model_config = ConfigDict(
        extra="forbid",
        allow_inf_nan=False,
        json_schema_extra={
            "examples": [
                {
                    "groups": [
                        {
                            "prompt": "Name two fruits.",
                            "completions": ["An apple and a pear.", "A hammer."],
                        }
                    ]
                },
                {
                    "groups": [{"prompt_ids": [5, 6, 7], "completion_ids": [[8], [9, 10]]}],
                    "token_rewards": True,
                },
            ]
        },
    )


class ExplainRequest(GroupRequest):
    """One completion with its prompt, in any form of a group."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"prompt": "Name two fruits.", "completions": ["An apple and a pear."]}]
        }
    )

    @model_validator(mode="after")
    def _one_completion(self) -> ExplainRequest:
        given = self.completions or self.completion_ids or self.texts or []
        if len(given) != 1:
            raise ValueError("give one completion, which is explained token by token")
        return self


def _reply_fields() -> dict[str, Any]:
    """Those of `GroupScores`, but for the version, which a reply names once."""
    types = get_type_hints(GroupScores)
    return {
        field.name: (types[field.name], ... if field.default is MISSING else field.default)
        for field in fields(GroupScores)
        if field.name != "model_version"
    }


if TYPE_CHECKING:
    GroupReply = GroupScores
else:
    GroupReply = create_model(
        "GroupReply", __base__=Wire, __doc__=GroupScores.__doc__, **_reply_fields()
    )


class ScoreReply(Wire):
    model: str
    model_version: str
    results: list[GroupReply]
    timings_ms: dict[str, float]


class ExplainReply(Wire):
    """Text for people: `lines` about the completion (its tokens, the one that is read, its reward),
    `model_lines` about the model and its contract."""

    model: str
    model_version: str
    lines: list[str]
    model_lines: list[str]


class ErrorDetail(Wire):
    type: ErrorType
    message: str
    retryable: bool
    index: int | None = None


class ErrorReply(Wire):
    error: ErrorDetail


class ModelCard(Wire):
    id: str
    object: Literal["model"] = "model"
    model_version: str


class ModelList(Wire):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class RewardDistribution(Wire):
    """A histogram: the share of rewards between edges[i] and edges[i + 1], for n shares."""

    edges: list[float]
    shares: list[float]


class MonitorWarning(Wire):
    """What in the live rewards looks like reward hacking, or like another task than was trained."""

    type: Literal["drift", "length", "extremes"]
    message: str


class MonitoredModel(Wire):
    """The live rewards of one model version beside those of its held-out data.

    live and held_out have the same edges. drift: population stability index of the one against the
    other. length_correlation: Pearson's, of reward and number of tokens. share_at_extremes: of the
    live rewards outside what 98 % of the held-out ones lie in (expected: 0.02). null: not known
    (yet), or no held-out distribution in the contract.
    """

    model_version: str
    num_rewards: int
    mean: float | None
    std: float | None
    live: RewardDistribution | None
    held_out: RewardDistribution | None
    drift: float | None
    length_correlation: float | None
    share_at_extremes: float | None
    warnings: list[MonitorWarning]


class MonitorReply(Wire):
    """The model that is served now first, then those before it that are still remembered."""

    models: list[MonitoredModel]


class ModelInfo(Wire):
    """What a scorer says of its model; `reward_actor.info.model_info` fills it in.

    `path` is the way that sequences take through the network, `fallback_reason` why it is not the
    fastest. `normalisation` is empty for an ensemble whose members differ in it, `ensemble` says
    how they are combined. `rendering`: how text becomes ids, alongside tokenizer and template.
    """

    model_version: str
    dtype: str
    path: str
    fallback_reason: str | None
    format: Literal["chat", "text"]
    tokenizer_fingerprint: str
    template_date: str | None
    normalisation: dict[str, float]
    versions: dict[str, str]
    rendering: Rendering | None = None
    ensemble: Readout | None = None


class Info(ModelInfo):
    """What is served and every limit that a caller can run into. `generation` grows by one with
    every hot swap. `asleep`: it scores nothing until it is woken; `num_replicas` sleep then.
    `error_reward` is what other systems' routes answer for a sample that cannot be scored.
    `functions` are the operator's own, with their weights in the reward."""

    model: str
    generation: int = 0
    num_replicas: int = 1
    engine: str = "forest"
    asleep: bool = False
    limits: dict[str, float]
    error_reward: float | Literal["refuse"] = "refuse"
    functions: dict[str, float] = {}
    warnings: list[MonitorWarning] = []


class SwapRequest(Wire):
    """A model of the registry, by its name there."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"model": "helpfulness-v2"}]})

    model: Annotated[str, Field(min_length=1, max_length=128)]


class SwapReply(Wire):
    model: str
    model_version: str
    generation: int
    num_replicas: int


class ReplicaState(Wire):
    """What one replica says when it was told to sleep or to wake; seconds that it took."""

    replica: str
    asleep: bool
    seconds: float
    error: str | None = None


class SleepReply(Wire):
    """The service sleeps, or is awake, and every replica with it; seconds of the whole."""

    asleep: bool
    seconds: float
    replicas: list[ReplicaState]


class RegistryReply(Wire):
    """The names that the registry has, and that of the model that is served."""

    models: list[str]
    current: str


class Status(Wire):
    status: Literal["ok", "not_ready", "asleep"]
    model_version: str | None = None
    reason: str | None = None


def error_reply(
    type_: ErrorType, message: str, *, index: int | None = None
) -> tuple[int, dict[str, Any]]:
    """The HTTP status and the JSON body of an error."""
    detail = ErrorDetail(type=type_, message=message, retryable=type_ in RETRYABLE, index=index)
    return HTTP_STATUS[type_], ErrorReply(error=detail).model_dump()


ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorReply} for status in sorted(set(HTTP_STATUS.values()))
}
