"""The compact body of /v1/score over HTTP: answered as JSON is, and refused in JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from reward_actor import binary
from reward_actor.groups import Group

if TYPE_CHECKING:
    import httpx

    from reward_actor import RewardScorer


@pytest.mark.parametrize("token_rewards", [False, True])
def test_it_is_answered_as_json_is(
    http: httpx.Client, offline: RewardScorer, token_rewards: bool
) -> None:
    sent = [
        Group(prompt_ids=[5, 6, 7], completion_ids=[[8], [9] * 400, []]),
        Group(prompt_ids=[], completion_ids=[[], [399], [400]]),
        Group(prompt_ids=[5], completion_ids=[]),
    ]
    reply = http.post(
        "/v1/score",
        content=binary.encode_request(sent, token_rewards),
        headers={"Content-Type": binary.MEDIA_TYPE},
    )
    assert reply.status_code == 200
    assert reply.headers["Content-Type"] == binary.MEDIA_TYPE
    head, found = binary.decode_reply(reply.content, [3, 3, 0])
    body = {
        "groups": [{"prompt_ids": g.prompt_ids, "completion_ids": g.completion_ids} for g in sent],
        "token_rewards": token_rewards,
    }
    in_json = http.post("/v1/score", json=body).json()
    assert head["model"] == in_json["model"]
    assert head["model_version"] == in_json["model_version"] == offline.model_version
    types = [[error and error.type for error in group.errors] for group in found]
    assert types == [
        [None, "too_long", None],
        ["empty_sequence", None, "token_out_of_vocabulary"],
        [],
    ]
    for ours, theirs in zip(found, in_json["results"], strict=True):
        assert ours.rewards == pytest.approx(theirs["rewards"], abs=1e-6)
        assert ours.raw_scores == pytest.approx(theirs["raw_scores"], abs=1e-6)
        assert ours.num_tokens == theirs["num_tokens"]
        assert [e and {"type": e.type, "message": e.message} for e in ours.errors] == theirs[
            "errors"
        ]
        if token_rewards:
            for row, right in zip(ours.token_rewards or [], theirs["token_rewards"], strict=True):
                assert row == (None if right is None else pytest.approx(right, abs=1e-6))
    assert found[0].rewards[0] == pytest.approx(
        float(offline.score_ids([[5, 6, 7, 8]])[0]), abs=1e-5
    )


def test_a_bad_body_is_a_json_error(http: httpx.Client) -> None:
    good = binary.encode_request([Group(prompt_ids=[1], completion_ids=[[2]])])
    flags = good[:4] + b"\xff\0\0\0" + good[8:]
    negative = good[:-4] + b"\xff\xff\xff\xff"
    many = binary.encode_request([Group(prompt_ids=[1], completion_ids=[[2]] * 501)])
    huge = b"RWQ1" + b"\0\0\0\0" + b"\xff" * 8
    damaged = [good[:-1], good + b"\0", b"", b"{}", flags, negative, huge]
    cases = [(body, 422) for body in damaged] + [(many, 413), (good + bytes(10**6), 413)]
    for body, status in cases:
        reply = http.post("/v1/score", content=body, headers={"Content-Type": binary.MEDIA_TYPE})
        assert reply.status_code == status
        assert reply.json()["error"]["type"]
