"""The bodies of `POST /v1/score` as a client sees them: groups out, scores or a typed error in.

Groups of token ids travel in the compact form of `reward_actor.binary`, all others as JSON; so does
what asks for turn rewards, which ids have none of.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from email.utils import parsedate_to_datetime
from typing import Any, Literal

from reward_actor import binary, schema
from reward_actor.errors import RewardServiceError
from reward_actor.groups import Group, GroupScores, Whole

JSON = "application/json"

# What a reply of others means: a proxy's page, or Ray Serve's own text.
_TYPE_OF_STATUS = {
    401: "unauthenticated",
    403: "forbidden",
    404: "not_found",
    413: "body_too_large",
    429: "overloaded",
    504: "deadline_exceeded",
}


def is_ids(group: Group | Whole) -> bool:
    """Whether the group can travel in a binary body."""
    return isinstance(group, Group) and group.prompt_ids is not None


def weight(group: Group | Whole) -> int:
    """The characters or token ids of a group's sequences, each with its prompt."""
    if isinstance(group, Whole):
        return sum(map(len, group.texts))
    return group.num_characters + group.num_ids


def check(group: Group | Whole) -> None:
    """Raise ValueError for what has no place in a body."""
    if isinstance(group, Whole) and (
        group.ids or group.add_special_tokens or group.max_tokens is not None
    ):
        raise ValueError(
            "only texts of a Whole travel to a service, without special tokens and uncut; give ids "
            "as a Group"
        )


def encode(
    groups: Sequence[Group | Whole], token_rewards: bool, turn_rewards: bool = False
) -> tuple[bytes, str]:
    """A body and its media type. Raises ValueError for ids that an int32 cannot hold."""
    ids = [group for group in groups if isinstance(group, Group) and is_ids(group)]
    if len(ids) == len(groups) and not turn_rewards:
        return binary.encode_request(ids, token_rewards), binary.MEDIA_TYPE
    body = {"groups": [_to_json(group) for group in groups], "token_rewards": token_rewards}
    if turn_rewards:  # an older service refuses the field
        body["turn_rewards"] = True
    # ASCII only: a lone surrogate has no UTF-8 form, and is its own sample's error to get.
    return json.dumps(body).encode("ascii"), JSON


def _to_json(group: Group | Whole) -> dict[str, Any]:
    if isinstance(group, Whole):
        return {"texts": list(group.texts)}
    if group.prompt_ids is not None:
        return {
            "prompt_ids": [int(i) for i in group.prompt_ids],
            "completion_ids": [[int(i) for i in ids] for ids in group.completion_ids],
        }
    assert group.prompt is not None
    prompt = group.prompt if isinstance(group.prompt, str) else [dict(m) for m in group.prompt]
    completions = [c if isinstance(c, str) else dict(c) for c in group.completions]
    body: dict[str, Any] = {"prompt": prompt, "completions": completions}
    if len(group.tools):
        body["tools"] = [dict(tool) for tool in group.tools]
    if group.template_args:
        body["chat_template_kwargs"] = dict(group.template_args)
    return body


def decode(body: bytes, media_type: str, groups: Sequence[Group | Whole]) -> list[GroupScores]:
    """The scores of these groups. Raises ValueError for what is no reply to them."""
    sizes = [len(group) for group in groups]
    if media_type == binary.MEDIA_TYPE:
        return binary.decode_reply(body, sizes)[1]
    # A newer service may say more than this client knows.
    reply = schema.ScoreReply.model_validate_json(body, extra="ignore")
    if [len(result.rewards) for result in reply.results] != sizes:
        raise ValueError("the reply has scores of other groups than were sent")
    return [GroupScores(**vars(r), model_version=reply.model_version) for r in reply.results]


def is_passing(status: int) -> bool:
    """Whether what a reply refuses may be answered later."""
    return status == 429 or status >= 500


def error_of(url: str, status: int, headers: Mapping[str, str], body: bytes) -> RewardServiceError:
    """What a reply with another status than 200 means. A page that is none of ours is not quoted:
    nobody knows what it repeats."""
    retry_after_s = _retry_after_s(headers.get("Retry-After"))
    try:
        error = schema.ErrorReply.model_validate_json(body, extra="ignore").error
    except ValueError:
        default: Literal["unavailable", "invalid_request"]
        default = "unavailable" if status >= 500 else "invalid_request"
        return RewardServiceError(
            _TYPE_OF_STATUS.get(status, default),
            f"{url} replied HTTP {status} without saying why",
            retryable=is_passing(status),
            retry_after_s=retry_after_s,
        )
    return RewardServiceError(
        error.type,
        error.message,
        retryable=is_passing(status),
        index=error.index,
        retry_after_s=retry_after_s,
    )


def _retry_after_s(value: str | None) -> float | None:
    """Seconds, from either form of the header (RFC 9110, 10.2.3)."""
    if value is None:
        return None
    try:
        if value.strip().isdigit():
            return float(value)
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None
