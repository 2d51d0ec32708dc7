"""From the samples that trainers hand over to groups, and from scores back to their rewards."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import fsum
from statistics import fmean
from typing import Any, Literal, TypeVar, cast

from reward_actor import conversation
from reward_actor.conversation import as_messages
from reward_actor.errors import RewardServiceError
from reward_actor.groups import Completion, Group, GroupScores, Message, Prompt, SampleError

Said = str | Sequence[Message]
"""A completion as trainers hand it over: text, or the conversation since the prompt."""

TurnRewards = Literal["mean", "sum", "min"]
"""How the rewards of a completion's assistant turns become one."""

T = TypeVar("T")


@dataclass(frozen=True)
class Samples:
    """Where n samples stood that were grouped by equal prompts: those of group i at `places[i]`.

    errors: by their places, the samples that are in no group, since they cannot be read.
    """

    places: list[list[int]]
    errors: dict[int, SampleError]

    def rewards(self, scores: Sequence[GroupScores]) -> list[float | None]:
        """The reward of each of the n samples, of the groups' scores; None where there is none."""
        found: list[list[float | None]] = [group.rewards for group in scores]
        return in_order(found, self.places, dict.fromkeys(self.errors))

    def named(
        self,
        scores: Sequence[GroupScores],
        name: str,
        read: Callable[[GroupScores, str], list[float | None]],
    ) -> list[float | None]:
        """The rewards of this name, as `of_name` or `counted` reads them. Raises ValueError where
        the service gives none."""
        return in_order([read(g, name) for g in scores], self.places, dict.fromkeys(self.errors))

    def over_turns(
        self, scores: Sequence[GroupScores], completions: Sequence[Said], rule: TurnRewards | None
    ) -> Sequence[GroupScores]:
        """The groups' scores; with a rule, the rewards are the rule's over the assistant's turns of
        each of the n completions, without those of its prompt."""
        if rule is None:
            return scores
        return [
            replace(
                group,
                rewards=[
                    None if row is None else _RULES[rule](row[-_num_turns(completions[place]) :])
                    for row, place in zip(group.turn_rewards or [], where, strict=True)
                ],
            )
            for group, where in zip(scores, self.places, strict=True)
        ]

    def chosen(self, scores: Sequence[GroupScores], error_reward: float | None) -> list[float]:
        """The same with `rewards_of`'s rule for samples without one. Raises RewardServiceError."""
        rest = {place: _reward(None, e, error_reward) for place, e in self.errors.items()}
        return in_order(rewards_of(scores, error_reward), self.places, rest)


def to_groups(
    prompts: Sequence[Prompt],
    completions: Sequence[Said],
    tools: Sequence[Any] | None = None,
    template_args: Sequence[Any] | None = None,
) -> tuple[list[Group], Samples]:
    """The completions grouped by equal prompts, and where they stood.

    Of a completion that is a conversation, everything but its last message belongs to the prompt;
    one that no template takes (it ends with a tool's result, say) is an error of its sample, since
    a policy made it. tools, template_args: of each sample what its chat template is told besides;
    None: nothing. Raises ValueError for what the data set holds: prompts, tools, template_args.
    """
    groups: dict[str, tuple[Group, list[Completion], list[int]]] = {}
    errors: dict[int, SampleError] = {}
    nothing = [None] * len(prompts)
    told = (nothing if column is None else column for column in (tools, template_args))
    samples = zip(prompts, completions, *told, strict=True)
    for place, (prompt, completion, its_tools, its_args) in enumerate(samples):
        asked = prompt if isinstance(prompt, str) else conversation.messages(prompt, "prompt")
        group = Group(
            asked,
            template_args=conversation.template_args(its_args, "chat_template_kwargs"),
            tools=conversation.tools(its_tools, "tools"),
        )
        try:
            shown, said = _shown(asked, completion)
        except ValueError as error:
            errors[place] = SampleError("unrenderable", str(error))
            continue
        group = replace(group, prompt=shown)
        key = json.dumps([group.prompt, group.tools, group.template_args], default=str)
        _, texts, places = groups.setdefault(key, (group, [], []))
        texts.append(said)
        places.append(place)
    found = groups.values()
    whole = [replace(group, completions=texts) for group, texts, _ in found]
    return whole, Samples([places for *_, places in found], errors)


def in_order(
    values: Sequence[Sequence[T]], places: Sequence[Sequence[int]], rest: Mapping[int, T]
) -> list[T]:
    """The values of groups' samples back at their places, with the others by theirs."""
    pairs = [
        pair
        for of_group, where in zip(values, places, strict=True)
        for pair in zip(where, of_group, strict=True)
    ]
    return [value for _, value in sorted([*pairs, *rest.items()], key=lambda pair: pair[0])]


def checked_rule(turn_rewards: object) -> TurnRewards | None:
    """Raises ValueError for what is no rule for turn rewards."""
    if turn_rewards is not None and turn_rewards not in tuple(_RULES):
        known = ", ".join(_RULES)
        raise ValueError(f"turn_rewards is {turn_rewards!r}; it must be one of {known}, or unset")
    return cast("TurnRewards | None", turn_rewards)


def wanted(rule: TurnRewards | None) -> dict[str, bool]:
    """What `score_groups` is asked for besides the rewards."""
    return {} if rule is None else {"turn_rewards": True}


_RULES: dict[str, Callable[[Sequence[float]], float]] = {"mean": fmean, "sum": fsum, "min": min}


def of_name(scores: GroupScores, name: str) -> list[float | None]:
    """The rewards of this name. Raises ValueError where there is none."""
    named = scores.named_rewards or {}
    if name not in named:
        known = ", ".join(named) or "one reward without a name"
        raise ValueError(f"the service has no reward named {name!r}; it has {known}")
    return named[name]


def counted(scores: GroupScores, name: str) -> list[float | None]:
    """The same, with 0 where a function of the service had none, which is what it counts for in the
    reward; None is left for samples without a reward. Raises ValueError where there is none of this
    name."""
    return [
        0.0 if value is None and error is None else value
        for value, error in zip(of_name(scores, name), scores.errors, strict=True)
    ]


def _num_turns(completion: Said) -> int:
    """The assistant's turns of a completion; its last message is one, whatever its role."""
    earlier = () if isinstance(completion, str) else completion[:-1]
    return 1 + len([message for message in earlier if message.get("role") == "assistant"])


def rewards_of(scores: Sequence[GroupScores], error_reward: float | None) -> list[list[float]]:
    """The rewards of each group; for a sample without one `error_reward`, if the user chose any.

    Raises RewardServiceError otherwise: what has no reward must not seem to have one.
    """
    return [
        [
            _reward(reward, error, error_reward)
            for reward, error in zip(group.rewards, group.errors, strict=True)
        ]
        for group in scores
    ]


def _reward(reward: float | None, error: Any, error_reward: float | None) -> float:
    if reward is not None:
        return reward
    if error_reward is None:
        raise RewardServiceError(error.type, error.message)
    return error_reward


def _shown(prompt: Prompt, completion: Said) -> tuple[Prompt, Completion]:
    """What the completion's last message answers, and that message. Raises ValueError."""
    if isinstance(completion, str):
        return prompt, completion
    if not len(completion):
        return prompt, ""
    earlier, last = conversation.answered(completion, "completion")
    return [*as_messages(prompt), *earlier] if earlier else prompt, last
