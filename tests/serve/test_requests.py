"""What a refused body is told: where it is wrong, and never what it says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from fastapi.exceptions import RequestValidationError

from reward_actor import schema
from serve.errors import answer_invalid
from serve.http.requests import check

if TYPE_CHECKING:
    from pydantic import BaseModel

IDS = {"prompt_ids": [1], "completion_ids": [[2]]}
SECRET = "What my patient told me"


def group(**fields: Any) -> dict[str, Any]:
    return {"groups": [IDS, {"prompt": "Hi.", "completions": ["Yes?"], **fields}]}


def message(model: type[BaseModel], body: Any) -> str:
    with pytest.raises(RequestValidationError) as refused:
        check(model, body)
    nothing: Any = None
    return bytes(answer_invalid(nothing, refused.value).body).decode()


@pytest.mark.parametrize(
    ("model", "body", "told"),
    [
        (
            schema.ScoreRequest,
            {"groups": [], "token_reward": True},
            "unknown field 'token_reward'; did you mean 'token_rewards'?",
        ),
        (
            schema.ScoreRequest,
            group(completion=[]),
            "groups.1: unknown field 'completion'; did you mean 'completions'?",
        ),
        (
            schema.ScoreRequest,
            group(prompt=[{"role": "user", "contents": "Hi."}]),
            "groups.1.prompt.0: unknown field 'contents'; did you mean 'content'?",
        ),
        # A field of the group is none of the whole body.
        (
            schema.ScoreRequest,
            {"groups": [], "prompt": "Hi."},
            "unknown field 'prompt'; did you mean 'groups'?",
        ),
        (schema.SwapRequest, {"model": "a", "version": 1}, "unknown field 'version'; known keys"),
    ],
)
def test_an_unknown_field_is_named_with_the_nearest_one(
    model: type[BaseModel], body: Any, told: str
) -> None:
    assert told in message(model, body)


@pytest.mark.parametrize("key", [SECRET, "x" * 65, "", "ключ"])
def test_a_key_that_does_not_read_as_a_field_is_told_by_its_place(key: str) -> None:
    told = message(schema.ScoreRequest, group(**{key: 1}))
    assert "groups.1: unknown field number 3 of 3; known keys: chat_template_kwargs" in told
    assert not key or key not in told
    told = message(schema.ScoreRequest, group(prompt=[{key: 1, "role": "user", "content": SECRET}]))
    assert "groups.1.prompt.0: unknown field number 1 of 3; known keys: content" in told
    assert SECRET not in told
