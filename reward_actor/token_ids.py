"""What token ids end with under a contract, and which of them can be scored."""

from __future__ import annotations

from reward_actor.contract import ScoringContract
from reward_actor.groups import Rendered, SampleError, TruncatedIds, Whole


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
