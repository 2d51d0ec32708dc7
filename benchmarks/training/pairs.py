"""What is trained on: pairs of token sequences, drawn from a seed or read from a file."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common.tokens import FIRST_ID, trained_tokenizer
from benchmarks.common.workloads import Range, count_prefix_tokens
from reward_actor.files import read_rows
from trainer.data.comparisons import Comparison, Comparisons

if TYPE_CHECKING:
    from benchmarks.common.shapes import Shape

MAX_TOKENS = 1024
"""Of a side; pairs with a longer one are left out."""

_SEED = 13

Sides = tuple[list[int], list[int]]


@dataclass(frozen=True)
class PairWorkload:
    """Pairs in random order, enough for every step. `settings` says how they were made."""

    name: str
    pairs: Comparisons
    settings: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str, sides: Sequence[Sides], settings: dict[str, Any]) -> PairWorkload:
        items = [Comparison(pair, (1.0, 0.0), str(i), row=i + 1) for i, pair in enumerate(sides)]
        return cls(name, Comparisons.of(items, [name]), settings)

    def step(self, index: int, num_pairs: int) -> list[int]:
        """The pairs of a step: no two steps share one."""
        return list(range(index * num_pairs, (index + 1) * num_pairs))

    def num_distinct_tokens(self, pairs: Sequence[int]) -> int:
        """Tokens of these pairs, what a pair's two sides begin with alike counted once."""
        return sum(count_prefix_tokens(self.pairs.sequences(i)) for i in pairs)


def synthetic(
    shape: Shape, num_pairs: int, prompt: Range, chosen: Range, rejected: Range
) -> PairWorkload:
    """Random ids: both sides begin with a prompt. Raises ValueError for sides that are too long."""
    longest = prompt.high + max(chosen.high, rejected.high)
    if longest > _max_tokens(shape):
        raise ValueError(f"synthetic: a side may have {longest} tokens; {_max_tokens(shape)} fit")
    source = random.Random(_SEED)

    def some(lengths: Range) -> list[int]:
        return source.choices(range(FIRST_ID, shape.vocab_size), k=lengths.draw(source))

    sides = []
    for _ in range(num_pairs):
        shared = some(prompt)
        sides.append(([*shared, *some(chosen)], [*shared, *some(rejected)]))
    settings = {
        "prompt_tokens": str(prompt),
        "chosen_tokens": str(chosen),
        "rejected_tokens": str(rejected),
    }
    return PairWorkload.of("synthetic", sides, settings)


def real(name: str, shape: Shape, path: Path, num_pairs: int) -> PairWorkload:
    """Random rows of a JSONL or JSONL.gz file of `{"chosen", "rejected"}` and maybe "prompt".

    A prompt and a side have an empty line between and are encoded whole. Raises ValueError for a
    line that does not fit, naming it, and if the file has too few pairs.
    """
    rows = list(_read_rows(path))
    tokenizer = trained_tokenizer((text for row in rows for text in row), shape)
    limit = _max_tokens(shape)
    sides: list[Sides] = []
    num_dropped = 0
    for row in random.Random(_SEED).sample(rows, len(rows)):
        if len(sides) == num_pairs:
            break
        chosen, rejected = (encoding.ids for encoding in tokenizer.encode_batch(row))
        if max(len(chosen), len(rejected)) <= limit:
            sides.append((chosen, rejected))
        else:
            num_dropped += 1
    if len(sides) < num_pairs:
        raise ValueError(
            f"{path} has {len(sides)} pairs of up to {limit} tokens a side; {num_pairs} are "
            "needed, because every step takes others"
        )
    settings = {"file": path.name, "max_tokens": limit, "num_over_long": num_dropped}
    return PairWorkload.of(name, sides, settings)


def _max_tokens(shape: Shape) -> int:
    return min(MAX_TOKENS, shape.max_position_embeddings)


def _read_rows(path: Path) -> Iterator[tuple[str, str]]:
    for place, row in read_rows(path):
        match row:
            case {"prompt": str(prompt), "chosen": str(chosen), "rejected": str(rejected)}:
                yield f"{prompt}\n\n{chosen}", f"{prompt}\n\n{rejected}"
            case {"chosen": str(chosen), "rejected": str(rejected)}:
                yield chosen, rejected
            case _:
                raise ValueError(f"{place}: expected the texts chosen and rejected")
