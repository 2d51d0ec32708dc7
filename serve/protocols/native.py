"""The native protocol, `POST /v1/score`; its types are those of `reward_actor.schema`."""

from __future__ import annotations

from reward_actor import schema
from reward_actor.groups import Group, GroupScores


def to_group(request: schema.GroupRequest) -> Group:
    if request.prompt_ids is not None:
        return Group(prompt_ids=request.prompt_ids, completion_ids=request.completion_ids or [])
    assert request.prompt is not None
    prompt = request.prompt
    if not isinstance(prompt, str):
        return Group([message.model_dump() for message in prompt], request.completions or [])
    return Group(prompt, request.completions or [])


def to_reply(scores: GroupScores) -> schema.GroupReply:
    return schema.GroupReply(
        rewards=scores.rewards,
        raw_scores=scores.raw_scores,
        num_tokens=scores.num_tokens,
        truncated=scores.truncated,
        errors=[
            None
            if error is None
            else schema.SampleErrorReply.model_validate(
                {"type": error.type, "message": error.message}
            )
            for error in scores.errors
        ],
        token_rewards=scores.token_rewards,
        members=scores.members,
        spread=scores.spread,
    )
