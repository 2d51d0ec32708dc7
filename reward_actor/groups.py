"""What goes into a scorer and what comes out: plain values, no dependency.

Shapes: a group holds one prompt and n completions; every list of its scores has length n. A scorer
has K members.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import isfinite
from typing import TYPE_CHECKING, Any, Literal

from reward_actor.errors import ErrorType

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from reward_actor.readout import Readout

    Scores = NDArray[np.float32]

LOGGED_AS = "reward/{}"
"""What a named reward is called among a trainer's own figures, which may have its name as well."""

Message = Mapping[str, Any]
"""One chat turn, {"role": str, "content": str} with what else `reward_actor.conversation` knows."""

Prompt = str | Sequence[Message]

Completion = str | Message
"""The turn that is scored: its text, or the assistant's message where it has more than a text."""


@dataclass(frozen=True)
class SampleError:
    """Why one sample has no reward."""

    type: ErrorType
    message: str


def _size(value: Any) -> int:
    return len(value if isinstance(value, str) else str(value))


@dataclass(frozen=True)
class Group:
    """A prompt and its n completions, as text or messages, or as token ids (never a mixture).

    With ids, the sequence that is scored is `prompt_ids + completion_ids[i]`, as given, with what
    is missing of the contract's end. `tools` and `template_args` go to the chat template.
    """

    prompt: Prompt | None = None
    completions: Sequence[Completion] = ()
    prompt_ids: Sequence[int] | None = None
    completion_ids: Sequence[Sequence[int]] = ()
    template_args: Mapping[str, Any] = field(default_factory=dict)
    tools: Sequence[Mapping[str, Any]] = ()

    def __post_init__(self) -> None:
        if isinstance(self.completions, str | Mapping):
            raise ValueError("completions is a single one; give a list of them")
        if (self.prompt is None) == (self.prompt_ids is None):
            raise ValueError("a group needs exactly one of prompt and prompt_ids")
        if self.prompt_ids is not None and self.completions:
            raise ValueError("prompt_ids goes with completion_ids, not with completions")
        if self.prompt is not None and self.completion_ids:
            raise ValueError("prompt goes with completions, not with completion_ids")
        if self.prompt_ids is not None and (self.tools or self.template_args):
            raise ValueError("tools and template_args go with a prompt; ids are rendered already")

    def __len__(self) -> int:
        return len(self.completions) if self.prompt_ids is None else len(self.completion_ids)

    @property
    def num_characters(self) -> int:
        """Of its n sequences as text, each with its prompt and what its template is told; messages
        count more than they hold, as a template runs."""
        if self.prompt is None:
            return 0
        told = [self.prompt] if isinstance(self.prompt, str) else [*self.prompt]
        told = [*told, *self.tools, self.template_args]
        return len(self) * sum(map(_size, told)) + sum(map(_size, self.completions))

    @property
    def num_ids(self) -> int:
        """The token ids of its n sequences, each with its prompt."""
        if self.prompt_ids is None:
            return 0
        return len(self) * len(self.prompt_ids) + sum(map(len, self.completion_ids))


@dataclass(frozen=True)
class Whole:
    """n whole sequences: text that its sender has templated already, or token ids.

    add_special_tokens: whether text gets what the tokenizer adds (a BOS, usually). Text that does
    not end with EOS gets it where the contract asks for one, and texts and ids get the contract's
    final token; what a chat template writes after the end of the last turn (a newline, say) is
    scored only where the contract says so. max_tokens: longer sequences
    are cut, keeping the left or the right end, to this or to what the "model" takes; None: they are
    errors, as everywhere.
    """

    texts: Sequence[str] = ()
    ids: Sequence[Sequence[int]] = ()
    add_special_tokens: bool = False
    max_tokens: int | Literal["model"] | None = None
    keep: Literal["left", "right"] = "right"

    def __post_init__(self) -> None:
        if self.texts and self.ids:
            raise ValueError("whole sequences are texts or ids, not both")

    def __len__(self) -> int:
        return len(self.texts) or len(self.ids)


@dataclass(frozen=True)
class GroupScores:
    """The scores of one group; index i of every list belongs to completion i.

    `rewards` are normalised by the contract, `raw_scores` are the head's output; both are None
    where `errors[i]` is set. `num_tokens` counts prompt + completion; `truncated[i]` says that the
    sample was longer and was cut, as its sender asked for.

    With token rewards, `token_rewards[i]` has a reward for each token (what the reward would be if
    the text ended there), `tokens[i]` what each token reads as, and `num_prompt_tokens[i]` how many
    of them are the prompt's.

    With turn rewards, `turn_rewards[i]` has the reward at the end of each assistant turn, those of
    the prompt first; the last one is `rewards[i]`, before what a service's reward functions add.

    Of an ensemble, rewards and raw scores are its members' combined by the rule; `named_rewards`
    has the members' own rewards by their names, and `spread[i]` is the standard deviation of those.
    """

    # The one list of these fields: JSON, binary bodies, files and clients are made from it.
    rewards: list[float | None]
    raw_scores: list[float | None]
    num_tokens: list[int]
    truncated: list[bool]
    errors: list[SampleError | None]
    model_version: str
    token_rewards: list[list[float] | None] | None = None
    tokens: list[list[str] | None] | None = None
    num_prompt_tokens: list[int] | None = None
    named_rewards: dict[str, list[float | None]] | None = None
    spread: list[float | None] | None = None
    turn_rewards: list[list[float] | None] | None = None

    def to_json(self) -> dict[str, Any]:
        """Every field by its name, as JSON has it; the lists are these, not copies."""
        errors = [None if error is None else asdict(error) for error in self.errors]
        return vars(self) | {"errors": errors}


def joined(parts: Sequence[GroupScores]) -> GroupScores:
    """The scores of several groups as those of one. The version is the first one's."""
    lists: dict[str, Any] = {
        name: [each for part in parts for each in getattr(part, name)]
        for name, value in vars(parts[0]).items()
        if isinstance(value, list)
    }
    named = None
    if parts[0].named_rewards is not None:
        named = {
            name: [each for part in parts for each in (part.named_rewards or {})[name]]
            for name in parts[0].named_rewards
        }
    return replace(parts[0], **lists, named_rewards=named)


class TruncatedIds(list[int]):
    """The token ids that were kept of a longer sample."""


Rendered = list[int] | SampleError
"""The token ids of one sample, or why it has none."""


def scorable(rendered: Sequence[Sequence[Rendered]]) -> list[list[int]]:
    """The token ids of every sample that can be scored, in order, over all groups."""
    return [ids for group in rendered for ids in group if not isinstance(ids, SampleError)]


def of_turns(token_scores: Sequence[Scores], turn_ends: Sequence[Sequence[int]]) -> list[Scores]:
    """n arrays (tokens, K) -> n arrays (turns, K): the scores where each sample's turns end."""
    return [scores[list(ends)] for scores, ends in zip(token_scores, turn_ends, strict=True)]


def assemble(
    rendered: Sequence[Sequence[Rendered]],
    raw_scores: Scores,
    readout: Readout,
    model_version: str,
    token_scores: Sequence[Scores] | None = None,
    turn_scores: Sequence[Scores] | None = None,
) -> list[GroupScores]:
    """Lay the raw scores (n, K) of `scorable(rendered)` back into the groups as rewards.

    A member's score that is not finite becomes an error of its sample. `token_scores` are the raw
    scores of every token, one (tokens, K) for each scorable sample; `turn_scores` those at the ends
    of its assistant turns, (turns, K).
    """
    reading = readout.read(raw_scores)
    finite: list[bool] = reading.finite.tolist()
    members: list[list[float]] = reading.members.tolist()
    columns = {"rewards": reading.rewards.tolist(), "raw_scores": reading.raw_scores.tolist()}
    if readout.is_ensemble:
        columns["spread"] = reading.spread.tolist()
    for name, scores in (("token_rewards", token_scores), ("turn_rewards", turn_scores)):
        if scores is not None:
            within = [readout.read(rows) for rows in scores]
            finite = [ok and bool(one.finite.all()) for ok, one in zip(finite, within, strict=True)]
            columns[name] = [one.rewards.tolist() for one in within]
    errors = [
        None if is_finite else _not_finite(members[index], readout)
        for index, is_finite in enumerate(finite)
    ]
    assert len(errors) == len(scorable(rendered)), "one row for each scorable sample"
    results, rows = [], iter(range(len(errors)))
    for group in rendered:
        found = [ids if isinstance(ids, SampleError) else next(rows) for ids in group]
        why = [at if isinstance(at, SampleError) else errors[at] for at in found]
        good = [at if isinstance(at, int) and errors[at] is None else None for at in found]
        of_group: dict[str, Any] = {
            name: [None if at is None else column[at] for at in good]
            for name, column in columns.items()
        }
        named = {
            name: [None if at is None else members[at][column] for at in good]
            for column, name in enumerate(readout.named)
        }
        num_tokens = [0 if isinstance(ids, SampleError) else len(ids) for ids in group]
        truncated = [isinstance(ids, TruncatedIds) for ids in group]
        results.append(
            GroupScores(
                num_tokens=num_tokens,
                truncated=truncated,
                errors=why,
                model_version=model_version,
                named_rewards=named or None,
                **of_group,
            )
        )
    return results


def _not_finite(members: Sequence[float], readout: Readout) -> SampleError:
    bad = [n for n, r in zip(readout.names, members, strict=True) if not isfinite(r)]
    whose = f"{bad[0]}'s" if readout.is_ensemble and bad else "the model's"
    return SampleError("non_finite_reward", f"{whose} reward is not finite")
