"""The compact body of /v1/score: what goes in comes out, and garbage is a ValueError."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reward_actor import binary
from reward_actor.groups import Group, GroupScores, SampleError

ids = st.lists(st.integers(0, 2**31 - 1), max_size=6)
groups = st.lists(
    st.builds(
        lambda prompt, completions: Group(prompt_ids=prompt, completion_ids=completions),
        ids,
        st.lists(ids, max_size=4),
    ),
    max_size=4,
)
floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
errors = st.builds(SampleError, st.sampled_from(["too_long", "non_finite_reward"]), st.text())


@st.composite
def scores(draw: st.DrawFn) -> list[GroupScores]:
    """Groups of one reply: token rewards and named rewards in all of them or in none."""
    has_tokens, names = draw(st.booleans()), draw(st.lists(st.text(), unique=True, max_size=3))
    has_turns, has_spread = draw(st.booleans()), draw(st.booleans())
    found = []
    for size in draw(st.lists(st.integers(0, 4), max_size=4)):
        failed = [draw(st.none() | errors) for _ in range(size)]

        def each(values: st.SearchStrategy[Any], failed: Any = failed) -> list[Any]:
            return [draw(values) if error is None else None for error in failed]

        lengths = [draw(st.integers(1, 5)) if error is None else 0 for error in failed]
        cut = [draw(st.booleans()) for _ in range(size)]
        group = GroupScores(each(floats), each(floats), lengths, cut, failed, "sha256:0")
        if has_tokens:
            rows = [
                None if error is not None else [draw(floats) for _ in range(length)]
                for length, error in zip(lengths, failed, strict=True)
            ]
            group = replace(group, token_rewards=rows)
        if names:
            named = {name: each(st.none() | floats) for name in names}
            group = replace(group, named_rewards=named, spread=each(floats) if has_spread else None)
        if has_turns:
            turns = each(st.lists(floats, min_size=1, max_size=3))
            group = replace(group, turn_rewards=turns)
        found.append(group)
    return found


@given(groups, st.booleans())
def test_a_request_comes_back(sent: list[Group], token_rewards: bool) -> None:
    assert binary.decode_request(binary.encode_request(sent, token_rewards)) == (
        sent,
        token_rewards,
    )


@given(scores())
def test_a_reply_comes_back(sent: list[GroupScores]) -> None:
    head = {"model_version": "sha256:0", "timings_ms": {"total": 1.5}}
    body = binary.encode_reply("name", sent, head)
    sizes = [len(group.rewards) for group in sent]
    found_head, found = binary.decode_reply(body, sizes)
    assert found_head == {"model": "name", **head}
    assert len(found) == len(sent)
    for ours, theirs in zip(found, sent, strict=True):
        for name in ("rewards", "raw_scores", "num_tokens", "truncated", "errors"):
            assert getattr(ours, name) == getattr(theirs, name)
        if any(theirs.rewards):
            assert ours.token_rewards == theirs.token_rewards
            assert ours.named_rewards == theirs.named_rewards
            assert ours.spread == theirs.spread
            assert ours.turn_rewards == theirs.turn_rewards


@given(groups, st.data())
def test_a_request_that_is_cut_off_or_goes_on_is_refused(sent: list[Group], data: Any) -> None:
    body = binary.encode_request(sent)
    cut = data.draw(st.integers(0, len(body) - 1))
    for wrong in (body[:cut], body + b"\0"):
        with pytest.raises(ValueError):  # noqa: PT011 - which of its checks finds it does not matter
            binary.decode_request(wrong)


def flipped(body: bytes, data: Any) -> bytes:
    changed = bytearray(body)
    for place, value in data.draw(
        st.lists(st.tuples(st.integers(0, len(body) - 1), st.integers(0, 255)), max_size=4)
    ):
        changed[place] = value
    return bytes(changed)


@settings(max_examples=300)
@given(groups, st.binary(max_size=64), st.data())
def test_garbage_is_a_value_error_and_nothing_else(
    sent: list[Group], tail: bytes, data: Any
) -> None:
    for body in (tail, b"RWQ1" + tail, flipped(binary.encode_request(sent), data)):
        try:
            found, token_rewards = binary.decode_request(body)
        except ValueError:
            continue
        assert binary.encode_request(found, token_rewards) == body


@settings(max_examples=300)
@given(scores(), st.binary(max_size=64), st.data())
def test_a_garbled_reply_is_a_value_error_and_nothing_else(
    sent: list[GroupScores], tail: bytes, data: Any
) -> None:
    body = binary.encode_reply("name", sent, {"model_version": "v", "timings_ms": {}})
    sizes = [len(group.rewards) for group in sent]
    cut = data.draw(st.integers(0, len(body) - 1))
    for wrong in (tail, b"RWR1" + tail, flipped(body, data), body[:cut], body + b"\0"):
        try:
            binary.decode_reply(wrong, sizes)
        except ValueError:
            continue


@pytest.mark.parametrize(
    "group",
    [
        Group("text", ["more"]),
        Group(prompt_ids=[2**31], completion_ids=[[1]]),
        Group(prompt_ids=[-1], completion_ids=[[1]]),
        Group(prompt_ids=[2**70], completion_ids=[[1]]),
        Group(prompt_ids=[1], completion_ids=[["5"]]),  # type: ignore[list-item]
        Group(prompt_ids=[1], completion_ids=[[1.5]]),  # type: ignore[list-item]
    ],
)
def test_what_is_no_token_id_is_not_encoded(group: Group) -> None:
    with pytest.raises(ValueError, match="ids"):
        binary.encode_request([group])


def test_the_layout_is_what_the_documents_say() -> None:
    body = binary.encode_request([Group(prompt_ids=[7, 8], completion_ids=[[9], []])], True)
    words = np.frombuffer(body[4:], "<u4").tolist()
    assert body[:4] == b"RWQ1"
    assert words == [1, 1, 2, 2, 2, 1, 0, 7, 8, 9]


def test_nan_is_what_an_error_has_in_the_place_of_a_reward() -> None:
    failed = GroupScores([None], [None], [0], [False], [SampleError("too_long", "x")], "v")
    body = binary.encode_reply("name", [failed], {"model_version": "v", "timings_ms": {}})
    reward, raw = np.frombuffer(body[-12:-4], "<f4")
    assert math.isnan(reward)
    assert math.isnan(raw)
