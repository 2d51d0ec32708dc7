"""Where the assistant's turns end among a sample's token ids, for a reward at each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from reward_actor import conversation
from reward_actor.groups import Completion, Group, Rendered, SampleError, Whole, scorable
from reward_actor.render import Renderer, Sample, said
from reward_actor.turns import AssistantTurns, assistant_turns, untold


@dataclass(frozen=True)
class _EndToken:
    """The token that ends a turn. is_hidden: where a message spells it, it is text."""

    id: int
    text: str
    is_hidden: bool


class TurnEnds:
    """Of what a renderer has rendered."""

    def __init__(self, renderer: Renderer) -> None:
        self._renderer = renderer
        self._contract = renderer.contract

    def first_without(self, groups: Sequence[Group | Whole]) -> tuple[int, str] | None:
        """The first group of a request for turn rewards that tells no turns, and why; or None."""
        reasons = enumerate(map(self._why_no_turns, groups))
        return next(((i, f"groups.{i}.{why}") for i, why in reasons if why), None)

    def _why_no_turns(self, group: Group | Whole) -> str | None:
        if isinstance(group, Whole):
            return "texts: turn_rewards need a prompt and completions; whole texts tell no turns"
        if group.prompt_ids is not None:
            return "prompt_ids: turn_rewards need a prompt and completions; token ids tell no turns"
        if self._contract.format != "chat":
            return "prompt: turn_rewards need a chat contract; this model's is 'text'"
        if self._end_token is None:
            return (
                "prompt: turn_rewards need a chat template that ends turns with a token of its "
                f"own; this model's has {self._contract.turn_end!r}"
            )
        return None

    def with_ends(
        self, groups: Sequence[Group | Whole], rendered: Sequence[Sequence[Rendered]]
    ) -> tuple[list[list[Rendered]], list[list[int]]]:
        """The rendered samples, those whose turns cannot be told as errors, and where the assistant
        turns of each scorable one end. For groups that `first_without` passes."""
        found = [self._turn_ends(*both) for both in zip(groups, rendered, strict=True)]
        kept: list[list[Rendered]] = [
            [e if isinstance(e, SampleError) else ids for ids, e in zip(*both, strict=True)]
            for both in zip(rendered, found, strict=True)
        ]
        return kept, scorable(found)

    def _turn_ends(self, group: Group | Whole, samples: Sequence[Rendered]) -> list[Rendered]:
        assert isinstance(group, Group)
        end = self._end_token
        assert end is not None
        of_texts = self._turns_of(group, "", end)
        found: list[Rendered] = []
        for ids, given in zip(samples, group.completions, strict=True):
            turns = of_texts if isinstance(given, str) else self._turns_of(group, given, end)
            if isinstance(ids, SampleError):
                found.append(ids)
            elif isinstance(turns, SampleError):
                found.append(turns)
            else:
                found.append(turns.places(ids, end.id, self._contract))
        return found

    def _turns_of(
        self, group: Group, given: Completion, end: _EndToken
    ) -> AssistantTurns | SampleError:
        """Of the samples of a group whose completions have the fields of `given`, whatever they
        say."""
        assert group.prompt is not None
        try:
            asked = self._renderer.prompts.read(
                Sample(group.prompt, "", group.tools, group.template_args)
            )
            last = said(conversation.completion(given, "completion"))
            if not end.is_hidden and end.text in str((asked, last)):
                return untold(f"a message spells {end.text!r}, the end of a turn; remove it")
            return assistant_turns(
                [*asked.prompt, last],
                lambda marked: self._renderer.text_of(marked, asked),
                end.text,
            )
        # A template that reads contents, which are not these here; or messages that are none.
        except ValueError as error:
            return untold(str(error))

    @cached_property
    def _end_token(self) -> _EndToken | None:
        """What `turn_end` ends with, if that is an added token, which no text melts into."""
        tokenizer = self._renderer.tokenizer
        added = tokenizer.added_tokens_decoder
        ids = tokenizer(self._contract.turn_end, add_special_tokens=False)["input_ids"]
        if not ids or ids[-1] not in added:
            return None
        token = added[ids[-1]]
        is_hidden = self._contract.plain_content and token.special
        return _EndToken(ids[-1], str(token), is_hidden)
