"""What the tests of reports share: plausible held-out pairs with their rewards, and a run."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from exports import CORPUS

from reward_actor.contract import ScoringContract
from trainer.config.config_file import load_config
from trainer.config.train import TrainConfig
from trainer.data.comparisons import Comparison, Comparisons
from trainer.init_model import train_tokenizer
from trainer.job import RunFacts

if TYPE_CHECKING:
    from numpy.typing import NDArray

COUNTS = {"pairs": 8_168, "ties": 0, "rankings": 0, "single completions": 0, "margins": 0}
FACTS = RunFacts(
    num_pairs=8_168, num_shared_prompts=0, num_steps=200, num_dropped=3, dropped="3 too long",
    num_failed_checkpoints=0, counts=COUNTS, row_format="text: the tokenizer has no chat template",
)  # fmt: skip
CONTRACT = ScoringContract(
    format="text", chat_template=None, turn_end="", add_special_tokens=False, append_eos=True,
    bos_token_id=None, eos_token_id=2, pad_token_id=0, max_length=512, vocab_size=400,
)  # fmt: skip
WORDS = ("apple", "pear", "knife", "spoon", "pan", "egg", "tree", "tool", "water", "please")


@cache
def tokenizer() -> Any:
    return train_tokenizer(CORPUS, vocab_size=400, max_length=512)


def config_of(output_dir: Path) -> TrainConfig:
    given = {"data.train": "pairs.jsonl", "output_dir": output_dir, "optimizer.learning_rate": 2e-3}
    return load_config(None, [(key, str(value)) for key, value in given.items()])


def comparisons(texts: Sequence[tuple[str, str, str]], tokenizer: Any) -> Comparisons:
    """(prompt, chosen, rejected) -> pairs of their token ids, in two subsets and none."""
    return Comparisons.of(
        (
            Comparison(
                [tokenizer.encode(prompt + side) for side in sides],
                (1, 0),
                prompt,
                row=row,
                subset=("math & logic", "<i>chat</i>", "")[row % 3],
            )
            for row, (prompt, *sides) in enumerate(texts, start=1)
        ),
        ["held-out.jsonl"],
    )


def plausible(tokenizer: Any, num_pairs: int = 450) -> tuple[Comparisons, NDArray[np.float32]]:
    """Pairs and their rewards: chosen is ahead by about 1, and length pays a little."""
    noise = random.Random(1)
    texts = [
        (
            f"How do I use {noise.choice(WORDS)} and {noise.choice(WORDS)}? ",
            *(" ".join(noise.choices(WORDS, k=noise.randint(2, 60))) for _ in range(2)),
        )
        for _ in range(num_pairs)
    ]
    held = comparisons(texts, tokenizer)
    drawn = np.random.default_rng(2).normal(size=held.num_sequences) * 0.8
    better = np.where(np.arange(held.num_sequences) % 2 == 0, 0.9, 0.0)
    return held, (drawn + better + held.lengths / 150).astype(np.float32)
