"""The ingress deployment: HTTP and Ray handles in, token ids out to the replicas, rewards back.

Scoring is a pure function, so a request whose replica died is simply sent again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from fastapi.responses import JSONResponse
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from reward_actor import schema
from reward_actor.contract import ScoringContract
from reward_actor.errors import RewardServiceError
from reward_actor.groups import Group, GroupScores, Rendered, assemble, scorable
from reward_actor.render import Renderer, tokenizer_fingerprint
from reward_actor.tokenizer import load_tokenizer
from serve.config import ServeConfig
from serve.http import build_api
from serve.protocols import native
from serve.wire import Description, FlatSequences, ReplicaReply

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

# How long to wait before a request goes out again, after a replica died or its queue was full.
_PAUSE_S = 0.05

# A probe wants to know whether a replica answers now, not whether one will.
_STATUS_TIMEOUT_S = 2.0

api = build_api()


@dataclass(frozen=True)
class _Model:
    """The model that the replicas were last seen to hold, and how to render for it."""

    description: Description
    contract: ScoringContract
    renderer: Renderer
    fingerprint: str


def _load(description: Description, config: ServeConfig) -> _Model:
    directory = Path(description.directory)
    tokenizer = load_tokenizer(directory, trust_remote_code=config.trust_remote_code)
    contract = ScoringContract.from_json(description.contract)
    return _Model(
        description,
        contract,
        Renderer(tokenizer, contract),
        tokenizer_fingerprint(tokenizer, contract),
    )


def _render(renderer: Renderer, groups: Sequence[Group]) -> list[list[Rendered]]:
    return [renderer.sequences(group) for group in groups]


def _parts(rendered: Sequence[Sequence[Rendered]], max_tokens: int) -> list[list[list[int]]]:
    """The scorable sequences in order, cut between groups into parts of about `max_tokens`."""
    parts: list[list[list[int]]] = []
    room = 0
    for group in rendered:
        sequences = scorable([group])
        num_tokens = sum(len(ids) for ids in sequences)
        if not parts or num_tokens > room:
            parts.append([])
            room = max_tokens
        parts[-1].extend(sequences)
        room -= num_tokens
    return [part for part in parts if part]


def _assemble(
    rendered: Sequence[Sequence[Rendered]],
    replies: Sequence[ReplicaReply],
    model: _Model,
    token_rewards: bool,
) -> list[GroupScores]:
    readout = model.description.readout
    none = np.empty((0, len(readout)), np.float32)
    raw = np.concatenate([none, *(_present(reply.raw_scores) for reply in replies)])
    per_token = None
    if token_rewards:
        per_token = [row for reply in replies for row in _present(reply.token_scores)]
    return assemble(rendered, raw, readout, model.description.model_version, per_token)


def _present(value: Any) -> Any:
    assert value is not None, "a reply that is ok carries its scores"
    return value


# Serve pickles the class where it is decorated: what it uses must stand above it.
@serve.deployment(name="Ingress", max_ongoing_requests=10_000)
@serve.ingress(api)
class Ingress:
    """Checks limits, renders and tokenises; one `score_groups` behind every route."""

    def __init__(self, config: ServeConfig, reward_model: DeploymentHandle[Any]) -> None:
        self._config = config
        self._reward_model = reward_model
        self._model: _Model | None = None
        self._name = config.name or Path(config.model).resolve().name
        api.state.body_limit_bytes = config.body_limit_bytes

    # ---- what the routes and Ray handles call

    async def score_groups(
        self, groups: Sequence[Group], token_rewards: bool = False
    ) -> list[GroupScores]:
        """Score groups before the deadline. Raises RewardServiceError."""
        timings: dict[str, float] = {}
        scores = await self._within_deadline(self._score(groups, token_rewards, timings))
        return cast("list[GroupScores]", scores)

    async def info(self) -> schema.Info:
        """What is served. Raises RewardServiceError while no replica is ready."""
        model = await self._within_deadline(self._current_model(refresh=True), _STATUS_TIMEOUT_S)
        contract = model.contract
        return schema.Info(
            model=self._name,
            model_version=model.description.model_version,
            dtype=model.description.dtype,
            path=model.description.path,
            fallback_reason=model.description.fallback_reason,
            format=contract.format,
            tokenizer_fingerprint=model.fingerprint,
            template_date=contract.template_date,
            normalisation=model.description.readout.normalisation,
            limits={
                **self._config.limits(),
                "max_batch_tokens": model.description.max_batch_tokens,
                "max_length": contract.max_length,
            },
            versions=model.description.versions,
            ensemble=schema.Info.ensemble_of(model.description.readout),
        )

    # ---- routes

    @api.post("/v1/score", response_model=schema.ScoreReply, responses=schema.ERROR_RESPONSES)
    async def score_route(self, request: schema.ScoreRequest) -> JSONResponse:
        """Score the completions of one or more prompts."""
        started = time.perf_counter()
        if request.model not in (None, self._name):
            raise RewardServiceError(
                "not_found", f"this service has no model of that name; it has {self._name!r}"
            )
        groups = [native.to_group(group) for group in request.groups]
        timings: dict[str, float] = {}
        scores = await self._within_deadline(self._score(groups, request.token_rewards, timings))
        timings["total"] = 1e3 * (time.perf_counter() - started)
        version = scores[0].model_version if scores else (await self._version())
        reply = schema.ScoreReply(
            model=self._name,
            model_version=version,
            results=[native.to_reply(score) for score in scores],
            timings_ms={name: round(ms, 3) for name, ms in timings.items()},
        )
        return JSONResponse(reply.model_dump(mode="json"))

    @api.get("/v1/models")
    async def models_route(self) -> schema.ModelList:
        """The models that this service scores with."""
        version = await self._version()
        return schema.ModelList(data=[schema.ModelCard(id=self._name, model_version=version)])

    @api.get("/info")
    async def info_route(self) -> schema.Info:
        """What is served, and every limit."""
        return await self.info()

    @api.get("/health")
    async def health_route(self) -> schema.Status:
        """The ingress is alive."""
        return schema.Status(status="ok")

    @api.get("/ready", responses={503: {"model": schema.Status}})
    async def ready_route(self) -> JSONResponse:
        """A model is loaded and its golden samples passed."""
        try:
            model = await self._within_deadline(
                self._current_model(refresh=True), _STATUS_TIMEOUT_S
            )
        except RewardServiceError:
            reason = "no replica has its model loaded"
            status = schema.Status(status="not_ready", reason=reason)
            return JSONResponse(status.model_dump(), status_code=503)
        version = model.description.model_version
        return JSONResponse(schema.Status(status="ok", model_version=version).model_dump())

    # ---- how scoring is done

    async def _score(
        self, groups: Sequence[Group], token_rewards: bool, timings: dict[str, float]
    ) -> list[GroupScores]:
        num_samples = sum(len(group) for group in groups)
        if num_samples > self._config.max_request_samples:
            raise RewardServiceError(
                "too_many_tokens",
                f"{num_samples} completions in one request; max_request_samples is "
                f"{self._config.max_request_samples}",
            )
        refresh = False
        while True:  # ends at the deadline; each turn has seen the replicas change their model
            model = await self._current_model(refresh=refresh)
            started = time.perf_counter()
            rendered = await asyncio.to_thread(_render, model.renderer, groups)
            timings["render"] = 1e3 * (time.perf_counter() - started)
            self._check_size(rendered)
            version = model.description.model_version
            parts = _parts(rendered, model.description.max_batch_tokens)
            replies = await self._ask_all(
                [FlatSequences.of(part, version) for part in parts], token_rewards
            )
            if all(reply.status == "ok" for reply in replies):
                timings["queue"] = 1e3 * max((r.queue_s for r in replies), default=0.0)
                timings["score"] = 1e3 * max((r.score_s for r in replies), default=0.0)
                return _assemble(rendered, replies, model, token_rewards)
            refresh = True

    async def _ask_all(
        self, parts: Sequence[FlatSequences], token_scores: bool
    ) -> list[ReplicaReply]:
        """Every part's reply, in order. When one fails, nobody waits for the others."""
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._ask(part, token_scores)) for part in parts]
        except* RewardServiceError as failures:
            raise failures.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _ask(self, sequences: FlatSequences, token_scores: bool) -> ReplicaReply:
        """One part's reply; asks again when a replica died with it. Raises RewardServiceError."""
        while True:
            response = self._reward_model.score.remote(sequences, token_scores)
            try:
                reply: ReplicaReply = await response
            except asyncio.CancelledError:
                response.cancel()  # or the replica would score for a caller who has gone
                raise
            except (RayActorError, DeploymentUnavailableError, BackPressureError):
                await asyncio.sleep(_PAUSE_S)
                continue
            if reply.status == "failed":
                raise RewardServiceError("internal", reply.reason)
            if reply.status == "overloaded":
                raise RewardServiceError(
                    "overloaded",
                    f"the queue is full; try again in {reply.retry_after_s:.1f} s",
                    retryable=True,
                    retry_after_s=reply.retry_after_s,
                )
            return reply

    async def _current_model(self, refresh: bool = False) -> _Model:
        if self._model is not None and not refresh:
            return self._model
        while True:
            try:
                description: Description = await self._reward_model.describe.remote()
                break
            except (RayActorError, DeploymentUnavailableError):
                await asyncio.sleep(_PAUSE_S)
        known = self._model
        if known is None or known.description.model_version != description.model_version:
            self._model = await asyncio.to_thread(_load, description, self._config)
        assert self._model is not None
        return self._model

    async def _version(self) -> str:
        model = await self._within_deadline(self._current_model())
        return cast("str", model.description.model_version)

    async def _within_deadline(self, work: Any, timeout_s: float | None = None) -> Any:
        timeout_s = timeout_s or self._config.request_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                return await work
        except TimeoutError:
            raise RewardServiceError(
                "deadline_exceeded",
                f"no answer of the reward model within {timeout_s:g} s",
                retryable=True,
            ) from None

    def _check_size(self, rendered: Sequence[Sequence[Rendered]]) -> None:
        num_tokens = sum(len(ids) for ids in scorable(rendered))
        if num_tokens > self._config.max_request_tokens:
            raise RewardServiceError(
                "too_many_tokens",
                f"{num_tokens} tokens in one request; max_request_tokens is "
                f"{self._config.max_request_tokens}. Send fewer groups at a time.",
            )
