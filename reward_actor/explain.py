"""How one row's rewards came about, token by token."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

from reward_actor.groups import SampleError

if TYPE_CHECKING:
    from reward_actor.contract import ScoringContract
    from reward_actor.groups import Group
    from reward_actor.scorer import RewardScorer

_TOO_LONG_TO_SHOW = ("chat_template", "golden", "held_out")


def explain(scorer: RewardScorer, group: Group) -> Iterator[str]:
    """Lines about every completion of `group`: what was rendered, its tokens, which one was read,
    the raw score and what made it the reward; and about the model, once."""
    yield from _about(scorer)
    [scores] = scorer.score([group])
    for number, ids in enumerate(scorer.renderer.sequences(group)):
        yield ""
        yield f"completion {number}"
        error = scores.errors[number]
        if isinstance(ids, SampleError):
            yield f"  no reward: {ids.type}: {ids.message}"
            continue
        tokenizer = scorer.renderer.tokenizer
        yield f"  rendered: {_quoted(tokenizer.decode(ids))}"
        for place, index in enumerate(ids):
            mark = "  <- read here" if place == len(ids) - 1 else ""
            yield f"  {place:>5} {index:>7} {_quoted(tokenizer.decode([index]))}{mark}"
        if error is not None:
            yield f"  no reward: {error.type}: {error.message}"
            continue
        yield f"  raw score {scores.raw_scores[number]:.7g}"
        if scores.members is not None and (members := scores.members[number]) is not None:
            named = zip(scorer.readout.names, members, strict=True)
            yield "  " + ", ".join(f"{name} {reward:.7g}" for name, reward in named)
        yield f"  reward {scores.rewards[number]:.7g} = {_formula(scorer)}"


def _about(scorer: RewardScorer) -> Iterator[str]:
    for member in scorer.members:
        yield f"model {member.path}"
        yield f"  version {member.version}"
        reasons = member.inferred.reasons if member.inferred else {}
        whole = "inferred; it has no scoring_contract.json" if member.inferred else "as exported"
        yield f"  contract ({whole}):"
        for name, value in _fields(member.contract):
            why = f"  (inferred: {reasons[name]})" if name in reasons else ""
            yield f"    {name} = {value}{why}"
    yield f"path {scorer.path}, {scorer.dtype}"
    if scorer.fallback_reason:
        yield f"  not a faster one: {scorer.fallback_reason}"


def _fields(contract: ScoringContract) -> Iterator[tuple[str, str]]:
    for name, value in asdict(contract).items():
        if name not in _TOO_LONG_TO_SHOW:
            yield name, _quoted(value)
    if contract.chat_template_sha256 is not None:
        yield "chat_template_sha256", contract.chat_template_sha256


def _formula(scorer: RewardScorer) -> str:
    if scorer.readout.is_ensemble:
        return f"the members' rewards combined by {scorer.readout.combine}"
    contract = scorer.contract
    return f"(raw score - {contract.mean:g}) / {contract.std:g}"


def _quoted(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
