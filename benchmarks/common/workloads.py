"""What is scored: lists of whole token sequences, drawn from a seed or read from a file.

Plain Python: the same flags give the same sequences on every machine and version.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from benchmarks.common.shapes import Shape
from benchmarks.common.tokens import FIRST_ID, trained_tokenizer
from reward_actor.files import read_rows

_SEED = 11

Ids = list[int]


@dataclass(frozen=True)
class Range:
    """Whole numbers from `low` to `high`, both included; drawn uniformly."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str) -> Range:
        """ "256" or "32..256". Raises ValueError for anything else."""
        low, dots, high = text.partition("..")
        if not low.isdecimal() or (dots and not high.isdecimal()):
            raise ValueError(f"{text!r} is neither a number nor MIN..MAX")
        bounds = cls(int(low), int(high) if dots else int(low))
        if not 1 <= bounds.low <= bounds.high:
            raise ValueError(f"{text!r}: 1 <= MIN <= MAX must hold")
        return bounds

    def draw(self, source: random.Random) -> int:
        return source.randint(self.low, self.high)

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}..{self.high}"


@dataclass(frozen=True)
class Workload:
    """Sequences to score together. `settings` says how they were made."""

    name: str
    sequences: list[Ids]
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """Tokens of the unshared sequences: what effective tokens/s counts."""
        return sum(map(len, self.sequences))


def grpo(
    shape: Shape,
    num_groups: int,
    group_size: int,
    prompt_tokens: Range,
    completion_tokens: Range,
    *,
    name: str = "grpo",
) -> Workload:
    """Groups of `group_size` completions that share their prompt; one group after the other."""
    source = random.Random(f"{_SEED}-{name}")
    sequences = []
    for _ in range(num_groups):
        prompt = _draw_ids(source, shape, prompt_tokens.draw(source))
        sequences += [
            prompt + _draw_ids(source, shape, completion_tokens.draw(source))
            for _ in range(group_size)
        ]
    settings = {
        "num_groups": num_groups,
        "group_size": group_size,
        "prompt_tokens": str(prompt_tokens),
        "completion_tokens": str(completion_tokens),
    }
    return _checked(Workload(name, sequences, settings), shape)


def unique(shape: Shape, num_sequences: int, num_tokens: Range) -> Workload:
    """Sequences with distinct first tokens: no two share a prefix."""
    source = random.Random(f"{_SEED}-unique")
    firsts = source.sample(range(FIRST_ID, shape.vocab_size), num_sequences)
    sequences = [
        [first, *_draw_ids(source, shape, num_tokens.draw(source) - 1)] for first in firsts
    ]
    settings = {"num_sequences": num_sequences, "tokens": str(num_tokens)}
    return _checked(Workload("unique", sequences, settings), shape)


def real(shape: Shape, path: Path, max_groups: int) -> Workload:
    """The first groups of a JSONL or JSONL.gz file of `{"prompt", "completions": [...]}`.

    Each text, prompt and completion with an empty line between, is encoded whole by a byte-level
    BPE that is trained on all texts of the file, which spares a download. Sequences are cut at the
    shape's maximum. Raises ValueError naming the line that does not fit.
    """
    groups = [
        [f"{prompt}\n\n{completion}" for completion in completions]
        for prompt, completions in _read_groups(path)
    ]
    tokenizer = trained_tokenizer(chain.from_iterable(groups), shape)
    texts = list(chain.from_iterable(groups[:max_groups]))
    encoded = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    longest = shape.max_position_embeddings
    settings = {
        "file": path.name,
        "num_groups": len(groups[:max_groups]),
        "num_truncated": sum(len(ids) > longest for ids in encoded),
    }
    return _checked(Workload("real", [ids[:longest] for ids in encoded], settings), shape)


def count_prefix_tokens(sequences: Sequence[Sequence[int]]) -> int:
    """Distinct prefixes that are not empty: the nodes of a trie of the sequences.

    Written apart from the engine's own forest, whose saving it measures.
    """
    ordered = sorted(map(list, sequences))
    total = 0
    before: Sequence[int] = ()
    for sequence in ordered:
        shared = 0
        while shared < min(len(before), len(sequence)) and before[shared] == sequence[shared]:
            shared += 1
        total += len(sequence) - shared
        before = sequence
    return total


def _draw_ids(source: random.Random, shape: Shape, num_tokens: int) -> Ids:
    return source.choices(range(FIRST_ID, shape.vocab_size), k=num_tokens)


def _read_groups(path: Path) -> Iterator[tuple[str, list[str]]]:
    for place, row in read_rows(path):
        match row:
            case {"prompt": str(prompt), "completions": [_, *_] as completions}:
                yield prompt, [str(completion) for completion in completions]
            case _:
                raise ValueError(f"{place}: expected prompt and completions")


def _checked(workload: Workload, shape: Shape) -> Workload:
    longest = max(map(len, workload.sequences))
    if longest > shape.max_position_embeddings:
        raise ValueError(
            f"{workload.name}: a sequence has {longest} tokens; "
            f"the shape takes {shape.max_position_embeddings}"
        )
    return workload
