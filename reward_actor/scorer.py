"""`RewardScorer`: token sequences in, float32 rewards out. No Ray.

Legend: n sequences, K members: the heads of all models behind the scorer, usually one.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from reward_actor.contract import Combine
from reward_actor.devices import resolve_device
from reward_actor.engine.cache import RewardCache
from reward_actor.engine.engine import Attention, Engine, Plan
from reward_actor.engine.memory import limit_to_share
from reward_actor.golden import replay
from reward_actor.groups import Group, GroupScores, SampleError, assemble, of_turns, scorable
from reward_actor.model.ensemble import (
    Ensemble,
    ensemble_readout,
    ensemble_version,
    shared_contract,
)
from reward_actor.model.load import LoadedModel, load
from reward_actor.readout import Reading
from reward_actor.render import Renderer
from reward_actor.token_ids import checked
from reward_actor.turn_ends import TurnEnds

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from reward_actor.contract import ScoringContract

    Scores = NDArray[np.float32]

logger = logging.getLogger(__name__)

CACHE_SIZE = 65_536
"""Sequences whose raw scores are kept: 16 MB, with one head."""


class RewardScorer:
    """One loaded reward model, or an ensemble of them. A reward depends on its own sequence, never
    on its neighbours.

    members   the loaded models; each has its engine, at the same index of `engines`.
    readout   how the K heads' raw scores become one reward.
    contract  what the ids are rendered under.
    """

    def __init__(
        self,
        members: Sequence[LoadedModel],
        *,
        combine: Combine = "mean",
        k: float = 1.0,
        attention: Attention = "auto",
        max_batch_tokens: int | None = None,
        cache_size: int = CACHE_SIZE,
        memory_share: float = 1.0,
    ) -> None:
        """combine, k: the rule for several models; a single one has its contract's. cache_size:
        sequences whose raw scores are kept, 0 for none. memory_share: as for `Engine`.

        Raises ValueError as `Engine` does, for members that do not render alike, and for a contract
        that allows longer sequences than a network can score.
        """
        self.members = tuple(members)
        paths = [member.path for member in self.members]
        contracts = [member.contract for member in self.members]
        tokenizers = [member.tokenizer for member in self.members]
        self.contract: ScoringContract = shared_contract(paths, contracts, tokenizers)
        self.readout = ensemble_readout(paths, contracts, combine, k)
        self.model_version = ensemble_version(self.members, combine, k)
        self.renderer = Renderer(tokenizers[0], self.contract)
        self.engines = tuple(
            Engine(member.model, attention, max_batch_tokens, memory_share)
            for member in self.members
        )
        for longest in (engine.longest for engine in self.engines):
            if longest is not None and longest < self.contract.max_length:
                raise ValueError(
                    f"the contract's max_length is {self.contract.max_length}, but beyond "
                    f"{longest} tokens this network's dynamic rotary positions depend on what it "
                    "scored before; set max_length to that"
                )
        self.cache = RewardCache(cache_size) if cache_size else None

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path | Sequence[str | Path],
        device: str = "auto",
        dtype: str = "auto",
        attention: Attention = "auto",
        max_batch_tokens: int | None = None,
        trust_remote_code: bool = False,
        check_golden: bool = True,
        combine: Combine | None = None,
        k: float | None = None,
        cache_size: int = CACHE_SIZE,
        memory_share: float = 1.0,
    ) -> RewardScorer:
        """Load a reward model, find its fastest exact path and replay its golden samples.

        path: a directory of one model or of an ensemble (`ensemble.json`), or a list of models'
        directories, which are then an ensemble under `combine` ("mean" when not given, "min",
        "mean_minus_std") and `k`; device: "auto" (CUDA where there is one), "cpu", "cuda:0", ...;
        dtype: "auto" (each contract's), "float32", "bfloat16", "float16"; attention: "auto",
        "forest" (shared prefixes once) or "padded"; max_batch_tokens: rows in one forward pass,
        chosen from free memory when not given; cache_size: sequences whose raw scores are kept;
        memory_share: of a GPU's memory, what this process may take.
        Raises CheckpointError or ContractError (both ValueError), and ValueError for members that
        do not render alike.
        """
        places, rule, rule_k = _what(path, combine, k)
        limit_to_share(torch.device(resolve_device(device)), memory_share)
        scorer = cls(
            [
                load(place, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
                for place in places
            ],
            combine=rule,
            k=rule_k,
            attention=attention,
            max_batch_tokens=max_batch_tokens,
            cache_size=cache_size,
            memory_share=memory_share,
        )
        for engine in scorer.engines:
            engine.freeze()  # nobody else has these networks
        if check_golden:
            scorer.replay()
        logger.info("%s takes the path %r in %s", path, scorer.path, scorer.dtype)
        return scorer

    def replay(self) -> None:
        """Raise ContractError unless every member reproduces its golden samples."""
        for member, engine in zip(self.members, self.engines, strict=True):
            renderer = Renderer(member.tokenizer, member.contract)
            replay(renderer, member.dtype, engine.raw_scores, f"the {engine.path} path")

    @property
    def dtype(self) -> str:
        """The members' dtype; where they differ, all of them."""
        return ", ".join(dict.fromkeys(member.dtype for member in self.members))

    @property
    def path(self) -> str:
        """The path that sequences take through the network; where members differ, all of them."""
        return ", ".join(dict.fromkeys(engine.path for engine in self.engines))

    @property
    def fallback_reason(self) -> str | None:
        """Why sequences do not take the fastest path; None if they do."""
        reasons = dict.fromkeys(e.fallback_reason for e in self.engines if e.fallback_reason)
        return "; ".join(reasons) or None

    @property
    def tokenizer_path(self) -> Path:
        """Where the tokenizer lies that renders for all members."""
        return self.members[0].path.resolve()

    @property
    def num_cache_misses(self) -> int | None:
        """Sequences that were asked for and had to be computed; None without a cache."""
        return None if self.cache is None else self.cache.num_misses

    @property
    def max_batch_tokens(self) -> int:
        return min(engine.max_batch_tokens for engine in self.engines)

    def score(
        self, groups: Sequence[Group], token_rewards: bool = False, turn_rewards: bool = False
    ) -> list[GroupScores]:
        """Score every completion of every group; one that cannot be scored carries its error.

        Raises ValueError naming the first group that has no turns, where they are asked for.
        """
        turns = TurnEnds(self.renderer)
        if turn_rewards and (refused := turns.first_without(groups)) is not None:
            raise ValueError(refused[1])
        rendered = [self.renderer.sequences(group) for group in groups]
        turn_ends = None
        if turn_rewards:
            rendered, turn_ends = turns.with_ends(groups, rendered)
        sequences = scorable(rendered)
        per_token = self.token_scores(sequences) if token_rewards or turn_rewards else None
        raw = self.raw_scores(sequences) if per_token is None else self.last_scores(per_token)
        return assemble(
            rendered,
            raw,
            self.readout,
            self.model_version,
            per_token if token_rewards else None,
            None if per_token is None or turn_ends is None else of_turns(per_token, turn_ends),
        )

    def score_ids(self, sequences: Sequence[Sequence[int]]) -> Scores:
        """Rewards of whole token sequences, as given: (n,) float32.

        Raises ValueError naming the first sequence that is empty, too long, outside the
        vocabulary, or whose reward is not finite, and TypeError for ids that are not integers.
        """
        reading = self.readout.read(self.raw_scores(self._valid(sequences)))
        for index in np.flatnonzero(~reading.finite):
            raise _not_finite(int(index))
        return reading.rewards.astype(np.float32)

    def token_rewards(self, sequences: Sequence[Sequence[int]]) -> list[Scores]:
        """The reward at every token of every sequence. Raises ValueError as `score_ids` does."""
        rewards = []
        for index, scores in enumerate(self.token_scores(self._valid(sequences))):
            reading: Reading = self.readout.read(scores)
            if not reading.finite.all():
                raise _not_finite(index)
            rewards.append(reading.rewards.astype(np.float32))
        return rewards

    def plan(self, sequences: Sequence[Sequence[int]]) -> list[Plan] | None:
        """How each member scores these sequences, for `raw_scores` and `token_scores` to go by;
        needs no turn on the device. None with a cache, which decides what is computed."""
        return (
            None if self.cache is not None else [engine.plan(sequences) for engine in self.engines]
        )

    def raw_scores(
        self, sequences: Sequence[Sequence[int]], plans: list[Plan] | None = None
    ) -> Scores:
        """What the heads say of sequences that `Renderer.checked` has passed: (n, K) float32.

        Sequences that were asked for before come from the cache, bit by bit as they were.
        """
        if self.cache is None:
            return self._computed(sequences, plans)
        return self.cache.scores(self.model_version, sequences, self._computed)

    def _computed(
        self, sequences: Sequence[Sequence[int]], plans: list[Plan] | None = None
    ) -> Scores:
        members = [engine.raw_scores(sequences, plan) for engine, plan in self._planned(plans)]
        return np.concatenate(members, axis=1)

    def token_scores(
        self, sequences: Sequence[Sequence[int]], plans: list[Plan] | None = None
    ) -> list[Scores]:
        """What the heads say at every token of such sequences: n arrays (tokens, K)."""
        members = [engine.token_scores(sequences, plan) for engine, plan in self._planned(plans)]
        return [np.concatenate(rows, axis=1) for rows in zip(*members, strict=True)]

    def _planned(self, plans: list[Plan] | None) -> Iterable[tuple[Engine, Plan | None]]:
        given: Sequence[Plan | None] = plans or [None] * len(self.engines)
        return zip(self.engines, given, strict=True)

    def check(self) -> None:
        """Nothing: it scores as long as this process lives. An engine of its own processes may
        raise EngineDied here."""

    def close(self) -> None:
        """Nothing: its memory is free when nobody refers to it."""

    def offload(self) -> bool:
        """Move the weights from the GPU to host memory until `restore`; False on a CPU, where that
        would free nothing."""
        if any(engine.device.type == "cpu" for engine in self.engines):
            return False
        for engine in self.engines:
            engine.offload()
        return True

    def restore(self) -> None:
        """Score again. Raises RuntimeError if the device has no room, and as `replay` does."""
        for engine in self.engines:
            engine.restore()
        self.replay()

    def last_scores(self, token_scores: Sequence[Scores]) -> Scores:
        """n arrays (tokens, K) -> (n, K): the scores of the sequences that they end."""
        last = np.array([row[-1] for row in token_scores], np.float32)
        return last.reshape(len(token_scores), len(self.readout))

    def _valid(self, sequences: Sequence[Sequence[int]]) -> list[list[int]]:
        rows = []
        for index, sequence in enumerate(sequences):
            found = checked([operator.index(i) for i in sequence], self.contract)
            if isinstance(found, SampleError):
                raise ValueError(f"sequence {index}: {found.message}")
            rows.append(found)
        return rows


def _what(
    path: str | Path | Sequence[str | Path], combine: Combine | None, k: float | None
) -> tuple[tuple[Path, ...], Combine, float]:
    """The directories to load, and the rule for several. Raises ValueError as `Ensemble` does."""
    if not isinstance(path, (str, Path)):
        members = tuple(Path(member).expanduser() for member in path)
        ensemble = Ensemble(members, combine or "mean", 1.0 if k is None else k)
    elif combine is not None or k is not None:
        raise ValueError(
            f"combine and k go with a list of directories; {path} brings its own (in its "
            "ensemble.json, or its scoring contract)"
        )
    else:
        found = Ensemble.load(Path(path).expanduser())
        if found is None:
            return (Path(path),), "mean", 1.0
        ensemble = found
    return ensemble.members, ensemble.combine, ensemble.k


def _not_finite(index: int) -> ValueError:
    return ValueError(f"sequence {index}: the model's reward is not finite")
