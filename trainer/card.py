"""The README.md of an export. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from reward_actor.contract import ScoringContract
from trainer.config import TrainConfig


def model_card(config: TrainConfig, contract: ScoringContract, facts: Mapping[str, Any]) -> str:
    """A model card with the Hub's metadata; `facts` hold the counts and the held-out metrics."""
    accuracy = facts.get("heldout_accuracy")
    evaluation = (
        "No pairs were held out, so nothing is known about its accuracy."
        if accuracy is None
        else f"On {facts['heldout_num_pairs']} held-out pairs, about prompts that it never saw,\n"
        f"the chosen side gets the higher reward in {100 * accuracy:.1f} % (ties count half); the\n"
        f"mean difference of the rewards is {facts['heldout_reward_margin']:.3f}."
    )
    return f"""---
library_name: transformers
pipeline_tag: text-classification
tags: [reward-model, bradley-terry, rayward]
---

# Reward model

A Bradley-Terry reward model: one number for a prompt and a completion, higher is better. It says
which of two completions to one prompt is preferred; rewards of different prompts are not
comparable.

{evaluation}

| | |
|---|---|
| trained on | {facts["num_pairs"]} pairs, {facts["num_dropped"]} dropped ({facts["dropped"]}) |
| steps | {facts["num_steps"]} of {config.training.global_batch_pairs} pairs |
| learning rate | {config.optimizer.learning_rate:g}, {config.optimizer.schedule} |
| body | {config.model.dtype}; head and loss in float32 |
| format | {contract.format}, at most {contract.max_length} tokens |

```python
from reward_actor import Group, RewardScorer

scorer = RewardScorer.from_pretrained(".")
print(scorer.score([Group(prompt="Name two fruits.", completions=["Apples and pears.", "No."])]))
```

```
rayward serve .
```

`scoring_contract.json` says how text becomes token ids and which of them is pooled;
`resolved_config.json` and `training_log.jsonl` say how the model came about.
"""
