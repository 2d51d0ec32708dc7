"""The custom reward function of verl.

    export RAYWARD_URL=http://127.0.0.1:8000      # or several, with commas
    python3 -m verl.trainer.main_ppo ... \\
        reward.custom_reward_function.path=pkg://reward_actor.integrations.verl \\
        reward.custom_reward_function.name=compute_score \\
        +reward.custom_reward_function.reward_kwargs.prompt_key=question

(`custom_reward_function.path=...` in older versions, which may want the path of this file.) verl
gives a function the completion but not its prompt: prepare the data so that `extra_info` holds it,
as text or messages without any template, and name its key as prompt_key ("prompt" otherwise).
`tools` and `chat_template_kwargs` beside it go to the reward model's chat template. A conversation
in place of the completion's text, from an agent loop of yours, is rewarded at its end, with
`reward_kwargs.turn_rewards` ("mean", "sum", "min") for all assistant turns in it.
`compute_score_async` does the same in verl's event loop, where `compute_score` takes a thread.

Named rewards, of an ensemble or of several heads, are in the result next to `score`, as
`reward/NAME`, so that verl logs them (`reward_extra_info`). `reward_kwargs.reward_weights`,
{"helpful": 1.0, "brief": 0.2} say, makes their weighted sum the score.

A sample without a reward (too long, say) is an error, which ends the training, unless
`reward_kwargs.error_reward` names the reward that it shall have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from reward_actor.groups import LOGGED_AS, Group, GroupScores
from reward_actor.integrations.grouping import (
    Said,
    Samples,
    TurnRewards,
    checked_rule,
    counted,
    to_groups,
    wanted,
)
from reward_actor.integrations.scorers import async_client, client, url_or_variable
from reward_actor.shaping import weighted_sum

# Asked where a completion cannot be read: the reply has the names of the rewards.
_NOTHING = [Group("")]


def compute_score(
    data_source: str,
    solution_str: Said,
    ground_truth: Any,
    extra_info: Mapping[str, Any] | None = None,
    *,
    prompt_key: str = "prompt",
    url: str | None = None,
    error_reward: float | None = None,
    turn_rewards: TurnRewards | None = None,
    reward_weights: Mapping[str, float] | None = None,
    **ignored: Any,
) -> dict[str, float]:
    """{"score": the reward, "num_tokens", and each named reward} of one completion. Raises
    RewardServiceError, and ValueError where the prompt is missing, turn_rewards is no rule, or
    reward_weights has a name that no reward has."""
    rule = _rule(turn_rewards, reward_weights)
    groups, samples = _grouped(solution_str, extra_info, prompt_key)
    scorer = client(url_or_variable(url))
    scores = scorer.score_groups(groups or _NOTHING, **wanted(rule))
    return _result(samples, scores, solution_str, rule, error_reward, reward_weights)


async def compute_score_async(
    data_source: str,
    solution_str: Said,
    ground_truth: Any,
    extra_info: Mapping[str, Any] | None = None,
    *,
    prompt_key: str = "prompt",
    url: str | None = None,
    error_reward: float | None = None,
    turn_rewards: TurnRewards | None = None,
    reward_weights: Mapping[str, float] | None = None,
    **ignored: Any,
) -> dict[str, float]:
    """`compute_score`, awaited."""
    rule = _rule(turn_rewards, reward_weights)
    groups, samples = _grouped(solution_str, extra_info, prompt_key)
    scorer = async_client(url_or_variable(url))
    scores = await scorer.score_groups(groups or _NOTHING, **wanted(rule))
    return _result(samples, scores, solution_str, rule, error_reward, reward_weights)


def _result(
    samples: Samples,
    scores: Sequence[GroupScores],
    completion: Said,
    rule: TurnRewards | None,
    error_reward: float | None,
    weights: Mapping[str, float] | None,
) -> dict[str, float]:
    [whole], is_read = scores, bool(samples.places)
    rewarded = samples.over_turns(scores, [completion], rule) if is_read else ()
    [reward] = samples.chosen(rewarded, error_reward)
    # verl wants the same keys of each sample, of one without a reward, too.
    has_reward = is_read and whole.errors == [None]
    named = {
        name: counted(whole, name)[0] if has_reward else None for name in whole.named_rewards or {}
    }
    if weights and has_reward:
        weighted: dict[str, Any] = {name: counted(whole, name) for name in weights}
        reward = float(weighted_sum(weighted, weights)[0])
    found = {
        LOGGED_AS.format(name): reward if value is None else value for name, value in named.items()
    }
    return {"score": reward, "num_tokens": whole.num_tokens[0] if is_read else 0, **found}


def _rule(turn_rewards: TurnRewards | None, weights: object) -> TurnRewards | None:
    if turn_rewards and weights:
        raise ValueError("reward_weights are of a conversation's end; leave turn_rewards out")
    return checked_rule(turn_rewards)


def _grouped(
    completion: Said, extra_info: Mapping[str, Any] | None, prompt_key: str
) -> tuple[list[Group], Samples]:
    prompt = (extra_info or {}).get(prompt_key)
    if prompt is None:
        raise ValueError(
            f"extra_info has no {prompt_key!r}: a reward model scores a completion of a prompt. "
            "Put the prompt there when you prepare the data, or name its key as "
            "reward_kwargs.prompt_key"
        )
    told = ([(extra_info or {}).get(name)] for name in ("tools", "chat_template_kwargs"))
    # A table's column of messages comes back as an array.
    return to_groups([prompt if isinstance(prompt, str) else list(prompt)], [completion], *told)
