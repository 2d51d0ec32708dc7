"""Token ids: their common prefixes, what they end with under a contract, which can be scored."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from reward_actor.contract import ScoringContract
from reward_actor.groups import Rendered, SampleError, TruncatedIds, Whole

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

AnySequence = TypeVar("AnySequence", list[int], bytes, str)


def to_bytes(ids: ArrayLike) -> bytes:
    """Four bytes an id, which compare as the ids do, and much faster."""
    return np.asarray(ids, dtype=">u4").tobytes()


def common_prefix(*sequences: AnySequence) -> int:
    """The length of what all of these sequences (one at least) begin with."""
    # What the first and the last in lexicographic order share, all do.
    a, b = sequences if len(sequences) == 2 else (min(sequences), max(sequences))
    # By halves: comparing slices is much faster than comparing their elements here.
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low


def in_order(sequences: Sequence[AnySequence]) -> tuple[list[int], list[int]]:
    """The places of sequences in lexicographic order, and the length of what each of them, in that
    order, shares with the one before it: the most that it shares with any earlier one. The first
    shares 0."""
    order: list[int] = sorted(range(len(sequences)), key=sequences.__getitem__)
    shares = [common_prefix(sequences[a], sequences[b]) for a, b in pairwise(order)]
    return order, [0] * bool(order) + shares


def with_eos(ids: list[int], contract: ScoringContract) -> list[int]:
    """The ids of a text, which EOS ends where the contract asks for it."""
    eos = contract.eos_token_id
    if not contract.append_eos or eos is None or ids[-1:] == [eos]:
        return ids
    return [*ids, eos]


def with_end(ids: list[int], contract: ScoringContract) -> list[int]:
    """The ids of a prompt and a completion with what is missing of the contract's end."""
    end = contract.end_ids
    if ids and end:
        there = range(min(len(ids), len(end)), -1, -1)
        ids = [*ids, *end[next(n for n in there if ids[len(ids) - n :] == end[:n]) :]]
    return with_last(ids, contract)


def with_last(ids: list[int], contract: ScoringContract) -> list[int]:
    """Any ids with what the contract says of every sequence's last tokens."""
    final, dropped = contract.final_token_id, contract.drop_trailing_ids
    if ids and final is not None and ids[-1] != final:
        ids = [*ids, final]
    kept = len(ids)
    while kept and ids[kept - 1] in dropped:
        kept -= 1
    return ids if kept == len(ids) else ids[:kept]


def cut(ids: list[int], whole: Whole, contract: ScoringContract) -> Rendered:
    """The ids of a whole sequence with its last token, cut to what its sender allows."""
    n = contract.max_length if whole.max_tokens == "model" else whole.max_tokens
    ids = with_last(ids, contract)
    if n is not None and len(ids) > n:
        final = [] if contract.final_token_id is None else ids[-1:]  # is read, so it stays
        n -= len(final)
        rest = ids[: len(ids) - len(final)]
        ids = TruncatedIds((rest[:n] if whole.keep == "left" else rest[len(rest) - n :]) + final)
    return checked(ids, contract)


def checked(ids: list[int], contract: ScoringContract) -> Rendered:
    """`ids`, or why a sample of these ids cannot be scored."""
    if not ids:
        return SampleError("empty_sequence", "the sample has no tokens")
    if len(ids) > contract.max_length:
        return SampleError(
            "too_long", f"{len(ids)} tokens; the model's max_length is {contract.max_length}"
        )
    if min(ids) < 0 or max(ids) >= contract.vocab_size:
        bad = next(i for i in ids if not 0 <= i < contract.vocab_size)
        return SampleError(
            "token_out_of_vocabulary",
            f"token id {bad} is outside the vocabulary of {contract.vocab_size}",
        )
    return ids
