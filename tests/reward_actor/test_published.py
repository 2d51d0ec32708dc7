"""A model that others published gives the rewards that its card prints."""

from __future__ import annotations

import os

import pytest
from missing import SKYWORK, skip_without

from reward_actor import Group, RewardScorer

QUESTION = (
    "Jane has 12 apples. She gives 4 apples to her friend Mark, then buys 1 more apple, and "
    "finally splits all her apples equally among herself and her 2 siblings. How many apples does "
    "each person get?"
)
SHARED = (
    "1. Jane starts with 12 apples and gives 4 to Mark. 12 - 4 = 8. Jane now has 8 apples.\n"
    "2. Jane buys 1 more apple. 8 + 1 = 9. Jane now has 9 apples.\n"
    "3. Jane splits the 9 apples equally among "
)
RIGHT = (
    "herself and her 2 siblings (3 people in total). 9 ÷ 3 = 3 apples each. "
    "Each person gets 3 apples."
)
WRONG = "her 2 siblings (2 people in total). 9 ÷ 2 = 4.5 apples each. Each person gets 4 apples."


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*has no scoring_contract.json:UserWarning")
def test_the_rewards_of_skyworks_card() -> None:
    """https://huggingface.co/Skywork/Skywork-Reward-V2-Qwen3-0.6B, "Model Usage"."""
    if (directory := os.environ.get("SKYWORK")) is None:
        skip_without(SKYWORK)
    scorer = RewardScorer.from_pretrained(directory, dtype="bfloat16")
    prompt = [{"role": "user", "content": QUESTION}]
    (scores,) = scorer.score([Group(prompt, completions=[SHARED + RIGHT, SHARED + WRONG])])
    # The card's are of a GPU's attention kernel; 7.875 has a step of 0.03 in bfloat16.
    assert scores.rewards == pytest.approx([7.8750, 0.9453], abs=0.15)
