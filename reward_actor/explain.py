"""How one row's rewards came about, token by token."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING

from reward_actor.groups import SampleError

if TYPE_CHECKING:
    from reward_actor.contract import ScoringContract
    from reward_actor.groups import Group, GroupScores, Rendered, Whole
    from reward_actor.readout import Readout
    from reward_actor.render import Renderer
    from reward_actor.schema import ModelInfo
    from reward_actor.scorer import RewardScorer

_TOO_LONG_TO_SHOW = ("chat_template", "golden", "held_out")


def explain(scorer: RewardScorer, group: Group) -> Iterator[str]:
    """Lines about every completion of `group`: what was rendered, its tokens, which one was read,
    the raw score and what made it the reward; and about the model, once."""
    for member in scorer.members:
        yield f"model {member.path}"
        yield f"  version {member.version}"
        reasons = member.inferred.reasons if member.inferred else {}
        whole = "inferred; it has no scoring_contract.json" if member.inferred else "as exported"
        yield f"  contract ({whole}):"
        yield from about_contract(member.contract, reasons)
    yield from about_path(scorer)
    [scores] = scorer.score([group])
    completions = about_completions(group, scores, scorer.renderer, scorer.readout)
    for number, lines in enumerate(completions):
        yield ""
        yield f"completion {number}"
        yield from (f"  {line}" for line in lines)


def about_completions(
    group: Group | Whole, scores: GroupScores, renderer: Renderer, readout: Readout
) -> Iterator[Iterator[str]]:
    """Lines about each of the completions that have these scores."""
    for number, ids in enumerate(renderer.sequences(group)):
        yield _about_completion(ids, scores, number, renderer, readout)


def _about_completion(
    ids: Rendered, scores: GroupScores, number: int, renderer: Renderer, readout: Readout
) -> Iterator[str]:
    if isinstance(ids, SampleError):
        yield f"no reward: {ids.type}: {ids.message}"
        return
    tokenizer, error = renderer.tokenizer, scores.errors[number]
    yield f"rendered: {_quoted(tokenizer.decode(ids))}"
    for place, index in enumerate(ids):
        mark = "  <- read here" if place == len(ids) - 1 else ""
        yield f"{place:>5} {index:>7} {_quoted(tokenizer.decode([index]))}{mark}"
    if error is not None:
        yield f"no reward: {error.type}: {error.message}"
        return
    yield f"raw score {scores.raw_scores[number]:.7g}"
    if scores.named_rewards is not None:
        named = scores.named_rewards.items()
        yield ", ".join(f"{name} {rewards[number]:.7g}" for name, rewards in named)
    formula = f"the members' rewards combined by {readout.combine}"
    if not readout.is_ensemble:
        formula = f"(raw score - {readout.means[0]:g}) / {readout.stds[0]:g}"
    yield f"reward {scores.rewards[number]:.7g} = {formula}"


def about_path(taken: RewardScorer | ModelInfo) -> Iterator[str]:
    yield f"path {taken.path}, {taken.dtype}"
    if taken.fallback_reason:
        yield f"  not a faster one: {taken.fallback_reason}"


def about_contract(contract: ScoringContract, reasons: Mapping[str, str]) -> Iterator[str]:
    """A line for each field; reasons: of those that were inferred."""
    for name, value in _fields(contract):
        why = f"  (inferred: {reasons[name]})" if name in reasons else ""
        yield f"    {name} = {value}{why}"


def _fields(contract: ScoringContract) -> Iterator[tuple[str, str]]:
    for name, value in asdict(contract).items():
        if name not in _TOO_LONG_TO_SHOW:
            yield name, _quoted(value)
    if contract.chat_template_sha256 is not None:
        yield "chat_template_sha256", contract.chat_template_sha256


def _quoted(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
