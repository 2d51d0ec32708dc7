"""HTTP clients of the reward service: the same methods, sync and async. Neither torch nor ray."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import httpx

from reward_actor import schema
from reward_actor.errors import RewardServiceError, pause_s
from reward_actor.groups import Group, GroupScores, Prompt, SampleError

# Far below what a service accepts by default, and enough to fill its batches.
_SAMPLES_PER_REQUEST = 1024
_JSON = {"Content-Type": "application/json"}


class _Calls:
    """What both clients share: requests as JSON, replies as scores, when to try again."""

    def __init__(self, url: str, timeout_s: float) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"url is {url!r}; it must begin with http:// or https://")
        self.url = url.rstrip("/")
        self.timeout_s = timeout_s

    @staticmethod
    def bodies(groups: Sequence[Group], token_rewards: bool) -> list[bytes]:
        """One or more requests' bodies, in order; a group is never divided."""
        parts: list[list[Group]] = [[]]
        num_samples = 0
        for group in groups:
            if parts[-1] and num_samples + len(group) > _SAMPLES_PER_REQUEST:
                parts.append([])
                num_samples = 0
            parts[-1].append(group)
            num_samples += len(group)
        # ASCII only: a lone surrogate has no UTF-8 form, and is its own sample's error to get.
        return [
            json.dumps(
                {"groups": [_to_json(group) for group in part], "token_rewards": token_rewards}
            ).encode("ascii")
            for part in parts
        ]

    @staticmethod
    def scores(data: dict[str, Any]) -> list[GroupScores]:
        reply = schema.ScoreReply.model_validate(data)
        return [_from_reply(result, reply.model_version) for result in reply.results]

    @staticmethod
    def check(response: httpx.Response) -> dict[str, Any]:
        """The reply's JSON. Raises RewardServiceError for an error reply."""
        if response.status_code == 200:
            data: dict[str, Any] = response.json()
            return data
        retry_after = response.headers.get("Retry-After", "")
        retry_after_s = float(retry_after) if retry_after.isdigit() else None
        try:
            error = schema.ErrorReply.model_validate_json(response.content).error
        except ValueError:  # a proxy's page, or Ray Serve's own text
            raise RewardServiceError(
                "unavailable" if response.status_code >= 500 else "invalid_request",
                f"HTTP {response.status_code}: {response.text[:200]}",
                retryable=response.status_code >= 500,
                retry_after_s=retry_after_s,
            ) from None
        raise RewardServiceError(
            error.type,
            error.message,
            retryable=error.retryable or response.status_code >= 500,
            index=error.index,
            retry_after_s=retry_after_s,
        )

    def unreachable(self, error: httpx.TransportError) -> RewardServiceError:
        return RewardServiceError(
            "unavailable", f"{self.url}: {type(error).__name__}: {error}", retryable=True
        )


class RewardClient:
    """Calls `POST /v1/score` of a running service and waits for the scores.

    Tries again, with growing random pauses, after connection errors, 429 (as `Retry-After` says)
    and 5xx, until `timeout_s` after the call began; then raises RewardServiceError. Use it as a
    context manager or call `close()`.
    """

    def __init__(self, url: str, *, timeout_s: float = 120.0) -> None:
        self._calls = _Calls(url, timeout_s)
        self._http = httpx.Client(base_url=self._calls.url)

    def score(self, prompt: Prompt, completions: Sequence[str]) -> GroupScores:
        """The scores of one prompt's completions."""
        return self.score_groups([Group(prompt, completions)])[0]

    def score_groups(
        self, groups: Sequence[Group], token_rewards: bool = False
    ) -> list[GroupScores]:
        scores: list[GroupScores] = []
        for body in self._calls.bodies(groups, token_rewards):
            scores += self._calls.scores(self._send("POST", "/v1/score", body))
        return scores

    def info(self) -> schema.Info:
        return schema.Info.model_validate(self._send("GET", "/info"))

    def _send(self, method: str, path: str, body: bytes | None = None) -> dict[str, Any]:
        deadline = time.monotonic() + self._calls.timeout_s
        attempt = 0
        while True:
            try:
                left = max(0.1, deadline - time.monotonic())
                response = self._http.request(
                    method, path, content=body, headers=_JSON, timeout=left
                )
                return self._calls.check(response)
            except httpx.TransportError as error:
                failure = self._calls.unreachable(error)
            except RewardServiceError as error:
                failure = error
            time.sleep(pause_s(failure, attempt, deadline))
            attempt += 1

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> RewardClient:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class AsyncRewardClient:
    """`RewardClient` for asyncio: the same methods, awaited."""

    def __init__(self, url: str, *, timeout_s: float = 120.0) -> None:
        self._calls = _Calls(url, timeout_s)
        self._http = httpx.AsyncClient(base_url=self._calls.url)

    async def score(self, prompt: Prompt, completions: Sequence[str]) -> GroupScores:
        """The scores of one prompt's completions."""
        return (await self.score_groups([Group(prompt, completions)]))[0]

    async def score_groups(
        self, groups: Sequence[Group], token_rewards: bool = False
    ) -> list[GroupScores]:
        scores: list[GroupScores] = []
        for body in self._calls.bodies(groups, token_rewards):
            scores += self._calls.scores(await self._send("POST", "/v1/score", body))
        return scores

    async def info(self) -> schema.Info:
        return schema.Info.model_validate(await self._send("GET", "/info"))

    async def _send(self, method: str, path: str, body: bytes | None = None) -> dict[str, Any]:
        deadline = time.monotonic() + self._calls.timeout_s
        attempt = 0
        while True:
            try:
                left = max(0.1, deadline - time.monotonic())
                response = await self._http.request(
                    method, path, content=body, headers=_JSON, timeout=left
                )
                return self._calls.check(response)
            except httpx.TransportError as error:
                failure = self._calls.unreachable(error)
            except RewardServiceError as error:
                failure = error
            await asyncio.sleep(pause_s(failure, attempt, deadline))
            attempt += 1

    async def close(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> AsyncRewardClient:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()


def _to_json(group: Group) -> dict[str, Any]:
    if group.prompt_ids is not None:
        return {
            "prompt_ids": list(group.prompt_ids),
            "completion_ids": [list(ids) for ids in group.completion_ids],
        }
    assert group.prompt is not None
    prompt = group.prompt if isinstance(group.prompt, str) else [dict(m) for m in group.prompt]
    return {"prompt": prompt, "completions": list(group.completions)}


def _from_reply(reply: schema.GroupReply, model_version: str) -> GroupScores:
    return GroupScores(
        rewards=reply.rewards,
        raw_scores=reply.raw_scores,
        num_tokens=reply.num_tokens,
        truncated=reply.truncated,
        errors=[None if e is None else SampleError(e.type, e.message) for e in reply.errors],
        model_version=model_version,
        token_rewards=reply.token_rewards,
        tokens=reply.tokens,
        num_prompt_tokens=reply.num_prompt_tokens,
        members=reply.members,
        spread=reply.spread,
    )
