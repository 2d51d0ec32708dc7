"""What every route and every handle of the service ends in: groups in, rewards out, in time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from reward_actor import schema
from reward_actor.errors import RewardServiceError
from reward_actor.explain import about_completions, about_contract, about_path
from reward_actor.groups import (
    Group,
    GroupScores,
    Rendered,
    SampleError,
    Whole,
    assemble,
    of_turns,
)
from reward_actor.turn_ends import TurnEnds
from serve.config import ServeConfig
from serve.ingress.dispatch import Dispatched, Dispatcher, OtherVersion, asleep
from serve.ingress.functions import Functions, RewardFunctions
from serve.ingress.replicas import Model, Replicas
from serve.monitoring.observer import Observer
from serve.wire import Description

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

Result = TypeVar("Result")

# A probe wants to know whether a replica answers now, not whether one will.
_STATUS_TIMEOUT_S = 3.0
# Characters that are tokenised at once without a thread: about half a millisecond of work.
_INLINE_CHARACTERS = 4096
# No text has so many for each of its tokens, but for runs of blanks.
_CHARACTERS_PER_TOKEN = 64


@dataclass(frozen=True)
class Scored:
    """The scores of a request's groups, all by one model, and that model's rewards without what
    functions add; timings in milliseconds, and the tokens that were computed, shared prefixes
    once."""

    results: list[GroupScores]
    model_rewards: list[list[float | None]]
    model: Model
    timings_ms: dict[str, float]
    computed_tokens: int

    @property
    def model_version(self) -> str:
        return self.model.version


class RewardService:
    """One ingress's side of the service. Use from one event loop."""

    def __init__(
        self,
        config: ServeConfig,
        handle: DeploymentHandle[Any],
        app_name: str,
        sender: str,
        log_file: Path | None = None,
    ) -> None:
        """log_file: where lines about requests go; none for none."""
        self.config = config
        self.replicas = Replicas(
            handle,
            sender,
            trust_remote_code=config.trust_remote_code,
            on_refresh=self._replicas_are,
        )
        self.dispatcher = Dispatcher(
            self.replicas.send,
            max_queued_tokens=config.max_queued_tokens,
            max_queue_s=config.max_queue_s,
            target_batch_s=config.target_batch_s,
            num_ingress=config.num_ingress,
        )
        self.functions = None if config.functions is None else Functions.load(config.functions)
        self._running = (
            None
            if self.functions is None
            else RewardFunctions(self.functions, config.request_timeout_s)
        )
        self.observer = Observer(
            config, app_name, sender, log_file, queued_tokens=lambda: self.dispatcher.queued_tokens
        )

    async def score(
        self,
        groups: Sequence[Group | Whole],
        *,
        token_rewards: bool = False,
        turn_rewards: bool = False,
    ) -> Scored:
        """Score groups before the deadline. Raises RewardServiceError."""
        started = time.perf_counter()
        work = self._rewarded(groups, token_rewards, turn_rewards, started)
        scored = await self.within_deadline(work)
        scored.timings_ms["total"] = 1e3 * (time.perf_counter() - started)
        self.observer.scored(
            scored.results,
            scored.model_rewards,
            scored.model_version,
            scored.timings_ms,
            scored.computed_tokens,
        )
        return scored

    async def explain(self, group: Group | Whole) -> schema.ExplainReply:
        """How the reward of a group's one completion comes about; it counts in no statistics.
        Raises RewardServiceError."""
        return await self.within_deadline(self._explain(group))

    async def _explain(self, group: Group | Whole) -> schema.ExplainReply:
        started = time.perf_counter()
        scored = await self._score([group], False, False)
        with_functions = await self._added([group], scored, started)
        weights = {} if self._running is None else self._running.weights
        return await asyncio.to_thread(
            _explained, group, scored, with_functions.results[0], weights
        )

    async def model(self) -> Model:
        """What is served now. Raises RewardServiceError while no replica answers, or all sleep."""
        model = await self._described()
        if self.replicas.is_asleep:
            raise asleep()
        return model

    @property
    def functions_hang(self) -> bool:
        """Whether no request can be answered for the sake of reward functions that do not end."""
        return self._running is not None and self._running.hang

    async def known_model(self) -> Model:
        """What was served when the replicas were last asked. Raises RewardServiceError while none
        has answered yet."""
        self._watch()
        return await self.within_deadline(self.replicas.model())

    async def info(self) -> schema.Info:
        """What is served, and every limit. Raises RewardServiceError while nothing is."""
        model = await self._described()
        is_asleep = self.replicas.is_asleep
        return schema.Info(
            **dict(model.description.info),
            model=model.name,
            generation=model.generation,
            num_replicas=(self.replicas.num_asleep if is_asleep else self.dispatcher.num_replicas),
            engine=self.config.engine,
            asleep=is_asleep,
            limits={
                **self.config.limits(),
                "max_batch_tokens": model.description.max_batch_tokens,
                "max_length": model.contract.max_length,
            },
            error_reward=self.config.error_reward,
            functions={} if self._running is None else self._running.weights,
            warnings=self.observer.warnings(),
        )

    async def within_deadline(
        self, work: Awaitable[Result], timeout_s: float | None = None
    ) -> Result:
        """Raises RewardServiceError ("deadline_exceeded") when the time is over."""
        timeout_s = timeout_s or self.config.request_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                return await work
        except TimeoutError:
            raise RewardServiceError(
                "deadline_exceeded",
                f"no answer of the reward model within {timeout_s:g} s",
                retryable=True,
            ) from None

    async def _described(self) -> Model:
        """What is served now, even if it sleeps. Raises RewardServiceError."""
        self._watch()
        return await self.within_deadline(self._fresh_model(), _STATUS_TIMEOUT_S)

    async def _fresh_model(self) -> Model:
        while True:
            model = await self.replicas.refresh()
            if model is not None:
                return model
            if self.replicas.is_asleep:  # since before this ingress was there
                raise asleep()
            await asyncio.sleep(0.1)

    async def _rewarded(
        self,
        groups: Sequence[Group | Whole],
        token_rewards: bool,
        turn_rewards: bool,
        started: float,
    ) -> Scored:
        return await self._added(
            groups, await self._score(groups, token_rewards, turn_rewards), started
        )

    async def _added(
        self, groups: Sequence[Group | Whole], scored: Scored, started: float
    ) -> Scored:
        """With the rewards of functions, if there are any. started: the request."""
        if self._running is None:
            return scored
        tokenizer = scored.model.renderer.tokenizer
        left_s = self.config.request_timeout_s - (time.perf_counter() - started)
        results = await self._running.added(groups, scored.results, tokenizer, left_s)
        return replace(scored, results=results)

    async def _score(
        self, groups: Sequence[Group | Whole], token_rewards: bool, turn_rewards: bool
    ) -> Scored:
        self._watch()
        if self.replicas.is_asleep:
            await self.model()  # it may be awake by now
        num_samples = sum(len(group) for group in groups)
        if num_samples > self.config.max_request_samples:
            raise RewardServiceError(
                "too_many_tokens",
                f"{num_samples} completions in one request; max_request_samples is "
                f"{self.config.max_request_samples}",
            )
        _check_given(groups, self.config.max_request_tokens)
        self.dispatcher.admit(1)  # what will be refused is not rendered
        model = await self.replicas.model()
        is_admitted = False
        while True:  # ends at the deadline; each turn has seen the replicas change their model
            started = time.perf_counter()
            rendered, turn_ends = await _render(model, groups, turn_rewards)
            rendered_s = time.perf_counter() - started
            sequences = [[s for s in g if not isinstance(s, SampleError)] for g in rendered]
            self._check_size(sequences)
            try:
                parts = await self.dispatcher.score(
                    sequences,
                    model.version,
                    model.generation,
                    token_rewards or turn_rewards,
                    is_admitted=is_admitted,
                )
            except OtherVersion:
                model = await self.replicas.model(other_than=model)
                is_admitted = True
                continue
            timings = {
                "render": 1e3 * rendered_s,
                "queue": 1e3 * max((part.queue_s for part in parts), default=0.0),
                "score": 1e3 * max((part.score_s for part in parts), default=0.0),
            }
            reply = groups, rendered, parts, model, token_rewards, turn_ends
            # What every token reads as takes a while; nobody else should wait for it.
            results = (
                (await asyncio.to_thread(_assemble, *reply)) if token_rewards else _assemble(*reply)
            )
            rewards = [result.rewards for result in results]
            return Scored(results, rewards, model, timings, sum(p.num_tokens for p in parts))

    def _check_size(self, groups: Sequence[Sequence[list[int]]]) -> None:
        num_tokens = sum(len(ids) for group in groups for ids in group)
        if num_tokens > self.config.max_request_tokens:
            raise _too_many(num_tokens, self.config.max_request_tokens)

    def _watch(self) -> None:
        self.replicas.watch()
        self.observer.watch()

    def _replicas_are(self, descriptions: list[Description]) -> None:
        self.observer.replicas_are(descriptions)
        self.dispatcher.num_replicas = len(descriptions)
        self.dispatcher.is_asleep = self.replicas.is_asleep
        if descriptions:
            self.dispatcher.max_batch_tokens = min(d.max_batch_tokens for d in descriptions)


async def _render(
    model: Model, groups: Sequence[Group | Whole], turn_rewards: bool
) -> tuple[list[list[Rendered]], list[list[int]] | None]:
    """The rendered samples and, if asked, where the assistant turns of each scorable one end.

    Raises RewardServiceError for a group that has no turns.
    """
    turns = TurnEnds(model.renderer)
    if turn_rewards and (refused := turns.first_without(groups)) is not None:
        index, why = refused
        raise RewardServiceError("invalid_request", why, index=index)

    def render() -> tuple[list[list[Rendered]], list[list[int]] | None]:
        rendered = [model.renderer.sequences(group) for group in groups]
        return turns.with_ends(groups, rendered) if turn_rewards else (rendered, None)

    if sum(map(sum, map(_given, groups))) <= _INLINE_CHARACTERS:
        return render()
    return await asyncio.to_thread(render)


def _explained(
    group: Group | Whole, scored: Scored, rewarded: GroupScores, weights: Mapping[str, float]
) -> schema.ExplainReply:
    """scored: by the model; rewarded: by functions with these weights as well."""
    model = scored.model
    completions = about_completions(
        group, scored.results[0], model.renderer, model.description.readout
    )
    has_reward = scored.results[0].errors == [None]
    about_functions = _about_functions(rewarded, weights) if weights and has_reward else ()
    return schema.ExplainReply(
        model=model.name,
        model_version=model.version,
        lines=[*next(completions), *about_functions],
        model_lines=[
            f"model {model.name}",
            f"  version {model.version}",
            "  contract:",
            *about_contract(model.contract, {}),
            *about_path(model.description.info),
        ],
    )


def _about_functions(rewarded: GroupScores, weights: Mapping[str, float]) -> Iterator[str]:
    [reward], [error] = rewarded.rewards, rewarded.errors
    if error is not None:
        yield f"no reward with functions: {error.type}: {error.message}"
        return
    for name, weight in weights.items():
        [value] = (rewarded.named_rewards or {})[name]
        yield f"function {name} {'none' if value is None else f'{value:.7g}'}, weight {weight:g}"
    yield f"reward with functions {reward:.7g}"


def _given(group: Group | Whole) -> tuple[int, int]:
    """The characters of text and the token ids that are rendered."""
    if isinstance(group, Whole):
        return sum(map(len, group.texts)), sum(map(len, group.ids))
    return group.num_characters, group.num_ids


def _check_given(groups: Sequence[Group | Whole], max_tokens: int) -> None:
    """Raise RewardServiceError for what is too much before it is rendered: a prompt is written out
    with each of its completions."""
    characters, ids = (sum(counts) for counts in zip((0, 0), *map(_given, groups), strict=True))
    if ids > max_tokens:
        raise _too_many(ids, max_tokens)
    if characters > _CHARACTERS_PER_TOKEN * max_tokens:
        raise RewardServiceError(
            "too_many_tokens",
            f"{characters} characters in one request, prompts counted with each completion; at "
            f"max_request_tokens {max_tokens} it may hold {_CHARACTERS_PER_TOKEN * max_tokens}. "
            "Send fewer groups at a time.",
        )


def _too_many(num_tokens: int, max_tokens: int) -> RewardServiceError:
    return RewardServiceError(
        "too_many_tokens",
        f"{num_tokens} tokens in one request; max_request_tokens is {max_tokens}. Send fewer "
        "groups at a time.",
    )


def _assemble(
    groups: Sequence[Group | Whole],
    rendered: Sequence[Sequence[Rendered]],
    parts: Sequence[Dispatched],
    model: Model,
    token_rewards: bool,
    turn_ends: Sequence[Sequence[int]] | None,
) -> list[GroupScores]:
    readout = model.description.readout
    none = np.empty((0, len(readout)), np.float32)
    raw = np.concatenate([none, *(part.raw_scores for part in parts)])
    per_token = [row for part in parts for row in part.token_scores or []]
    scores = assemble(
        rendered,
        raw,
        readout,
        model.version,
        per_token if token_rewards else None,
        None if turn_ends is None else of_turns(per_token, turn_ends),
    )
    if not token_rewards:
        return scores
    return [
        replace(
            score,
            tokens=[model.tokens(ids) for ids in samples],
            num_prompt_tokens=model.renderer.num_prompt_tokens(group, samples),
        )
        for score, group, samples in zip(scores, groups, rendered, strict=True)
    ]
