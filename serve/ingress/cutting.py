"""Which sequences travel in one message: cut by tokens, gathered by what they begin with. Pure.

A cut is what stays together on its way: groups of one request, or a piece of a group that is too
large for one message. Tokens are counted as they are computed, shared prefixes once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

# Of its tokens a cut must share this much with another one to be sent before older ones.
_MIN_SHARED = 0.25
# A message that is less full than this takes some of those that begin alike, though not all fit.
_MIN_FILL = 0.5


@dataclass(frozen=True)
class Cut:
    """Sequences that travel together, and the tokens that are computed for them."""

    sequences: list[list[int]]
    num_tokens: int


def shared_and_distinct_tokens(sequences: Sequence[list[int]]) -> tuple[int, int]:
    """The tokens of what all sequences begin with, and with it those that are computed at most."""
    if not sequences:
        return 0, 0
    shared = _common_prefix(min(sequences), max(sequences)) if len(sequences) > 1 else 0
    return shared, shared + sum(len(sequence) - shared for sequence in sequences)


def _common_prefix(a: list[int], b: list[int]) -> int:
    """Of the first and the last in lexicographic order: what all between begin with, too."""
    # By halves: comparing slices is much faster than comparing their elements here.
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low


def cut(groups: Sequence[Sequence[list[int]]], max_tokens: int) -> list[Cut]:
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


def _pieces(group: Sequence[list[int]], max_tokens: int) -> list[Cut]:
    shared, num_tokens = shared_and_distinct_tokens(group)
    if num_tokens <= max_tokens or len(group) < 2:
        return [Cut(list(group), num_tokens)] if group else []
    pieces: list[Cut] = []
    for sequence in group:
        own = len(sequence) - shared
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


def _families(cuts: Sequence[Cut]) -> list[list[int]]:
    """The places of those that begin alike, in lexicographic order; that of the oldest first."""
    families: list[list[int]] = []
    for place in sorted(range(len(cuts)), key=lambda place: cuts[place].sequences[0]):
        if families and _begin_alike(cuts[families[-1][-1]], cuts[place]):
            families[-1].append(place)
        else:
            families.append([place])
    return sorted(families, key=min)


def _begin_alike(a: Cut, b: Cut) -> bool:
    longer = max(len(a.sequences[0]), len(b.sequences[0]))
    return _shared(a, b) >= _MIN_SHARED * longer


def _shared(a: Cut, b: Cut) -> int:
    return _common_prefix(a.sequences[0], b.sequences[0])


def _around_oldest(cuts: Sequence[Cut], family: Sequence[int], room: int) -> tuple[list[int], int]:
    """The oldest of a family with its neighbours on both sides, as far as they fit, and the tokens
    that are computed for them."""
    middle = family.index(min(family))
    some, num_tokens = [family[middle]], cuts[family[middle]].num_tokens
    for side in (family[middle::-1], family[middle:]):
        for before, place in pairwise(side):
            added = cuts[place].num_tokens - _shared(cuts[before], cuts[place])
            if num_tokens + added > room:
                break
            some.append(place)
            num_tokens += added
    return some, num_tokens
