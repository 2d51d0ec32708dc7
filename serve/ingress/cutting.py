"""Which sequences travel in one message: cut by tokens, gathered by what they begin with. Pure.

A cut is what stays together on its way: groups of one request, or a piece of a group that is too
large for one message. Tokens are counted as they are computed, shared prefixes once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from reward_actor.token_ids import common_prefix, in_order

# Of its tokens a cut must share this much with another one to be sent before older ones.
_MIN_SHARED = 0.25
# A message that is less full than this takes some of those that begin alike, though not all fit.
_MIN_FILL = 0.5


@dataclass(frozen=True)
class Cut:
    """Sequences that travel together, the tokens that are computed for them (at most), and how many
    all of them begin with, as far as that was sought: 0 for several groups."""

    sequences: list[list[int]]
    num_tokens: int
    num_shared: int = 0

    @classmethod
    def of(cls, group: list[list[int]]) -> Cut:
        """A whole group, of one sequence at least."""
        shared = common_prefix(*group) if len(group) > 1 else 0
        return cls(group, shared + sum(len(sequence) - shared for sequence in group), shared)


def cut(groups: Sequence[Cut], max_tokens: int) -> list[Cut]:
    """All sequences in order, cut into pieces of at most `max_tokens` computed tokens.

    A group is divided only if it is larger than that by itself, and a sequence never.
    """
    cuts: list[Cut] = []
    for group in groups:
        for piece in _pieces(group, max_tokens):
            if cuts and cuts[-1].num_tokens + piece.num_tokens <= max_tokens:
                last = cuts.pop()
                piece = Cut(last.sequences + piece.sequences, last.num_tokens + piece.num_tokens)
            cuts.append(piece)
    return cuts


def _pieces(group: Cut, max_tokens: int) -> list[Cut]:
    if group.num_tokens <= max_tokens:
        return [group]
    pieces: list[Cut] = []
    for sequence in group.sequences:
        own = len(sequence) - group.num_shared
        if pieces and pieces[-1].num_tokens + own <= max_tokens:
            last = pieces.pop()
            pieces.append(Cut([*last.sequences, sequence], last.num_tokens + own))
        else:
            pieces.append(Cut([sequence], len(sequence)))
    return pieces


def fitting(cuts: Sequence[Cut], max_tokens: int) -> tuple[list[int], int]:
    """The places of those that go together, and the tokens that are computed for them (at most):
    the first, those that begin like it, the next, and so on, up to `max_tokens`.

    The first goes in any case. Those that begin alike wait for the next message when they do not
    all fit in what is left of this one and it is half full: what they share would be computed
    twice.
    """
    taken: list[int] = []
    num_tokens = 0
    for family in _families(cuts):
        some, added = _around_oldest(cuts, family, max_tokens - num_tokens)
        is_divided = len(some) < len(family) and num_tokens >= _MIN_FILL * max_tokens
        if taken and (is_divided or num_tokens + added > max_tokens):
            break
        taken += some
        num_tokens += added
    return sorted(taken), num_tokens


Family = list[tuple[int, int]]
"""The places of those that begin alike, in lexicographic order, each with the number of tokens that
it shares with the one before it."""


def _families(cuts: Sequence[Cut]) -> list[Family]:
    """That of the oldest first."""
    families: list[Family] = []
    before = 0
    for place, shared in zip(*in_order([cut.sequences[0] for cut in cuts]), strict=True):
        length = len(cuts[place].sequences[0])
        if families and shared >= _MIN_SHARED * max(before, length):
            families[-1].append((place, shared))
        else:
            families.append([(place, shared)])
        before = length
    return sorted(families, key=min)


def _around_oldest(cuts: Sequence[Cut], family: Family, room: int) -> tuple[list[int], int]:
    """The oldest of a family with its neighbours on both sides, as far as they fit, and the tokens
    that are computed for them."""
    oldest = family.index(min(family))
    some, num_tokens = [family[oldest][0]], cuts[family[oldest][0]].num_tokens
    before = [(family[i - 1][0], family[i][1]) for i in range(oldest, 0, -1)]
    for side in (before, family[oldest + 1 :]):
        for place, shared in side:
            added = cuts[place].num_tokens - shared
            if num_tokens + added > room:
                break
            some.append(place)
            num_tokens += added
    return some, num_tokens
