"""The hardest held-out pairs: the wrong ones, as text that begins where they part."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from reports import WORDS, comparisons, tokenizer

from trainer.data.comparisons import Comparison, Comparisons
from trainer.report.hardest import hardest_pairs


def test_the_hardest_pairs_are_the_wrong_ones_the_widest_first() -> None:
    prompt = "How do I boil an egg? "
    texts = [(prompt, f"Yes please, {word}.", f"No {word}.") for word in WORDS[:6]]
    held = comparisons(texts, tokenizer())
    rewards = np.float32([1, 0, 0, 3, 0, 0, 0, 1, 5, 4, 0, 2])
    pairs = hardest_pairs(held, rewards, tokenizer().decode)
    assert [pair.where for pair in pairs] == [f"held-out.jsonl:{row}" for row in (2, 6, 4, 3)]
    assert [pair.reward_margin for pair in pairs] == [-3, -2, -1, 0]
    assert pairs[0].shared.startswith(prompt.rstrip())
    assert pairs[0].shared + pairs[0].chosen == prompt + "Yes please, pear."
    assert pairs[0].shared + pairs[0].rejected == prompt + "No pear."
    assert (pairs[0].chosen_reward, pairs[0].rejected_reward) == (0, 3)
    assert len(hardest_pairs(held, rewards, tokenizer().decode, most=2)) == 2


def test_a_shared_beginning_does_not_cut_a_character_in_two() -> None:
    def decode(ids: Sequence[int]) -> str:
        return bytes(ids).decode("utf-8", errors="replace")

    a, b = "日本".encode(), "日木".encode()  # the second characters differ in their last byte only
    held = Comparisons.of([Comparison([list(a), list(b)], (1, 0), "x")], ["d"])
    (pair,) = hardest_pairs(held, np.float32([0, 1]), decode)
    assert (pair.shared, pair.chosen, pair.rejected) == ("日", "本", "木")


def test_all_pairs_of_a_ranking_can_be_hard() -> None:
    ranking = Comparisons.of([Comparison([[1, 2], [1, 3], [1, 4]], (2, 1, 0), "x", row=7)], ["d"])
    pairs = hardest_pairs(ranking, np.float32([0, 1, 5]), lambda ids: str(list(ids)))
    assert [(pair.chosen, pair.rejected) for pair in pairs] == [
        ("[2]", "[4]"), ("[3]", "[4]"), ("[2]", "[3]"),
    ]  # fmt: skip
