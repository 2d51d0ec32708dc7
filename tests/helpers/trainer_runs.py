"""What the tests of real trainings share: small data, a small config, the results on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

THINGS = ("apple", "pear", "knife", "spoon", "pan", "egg", "tree", "tool")


def write_pairs(path: Path, num_pairs: int = 48) -> Path:
    """Pairs whose chosen side is polite; a few thousand weights can learn that."""
    with path.open("w", encoding="utf-8") as file:
        for i in range(num_pairs):
            thing = THINGS[i % len(THINGS)]
            pair = {
                "prompt": f"Name {thing} {i}.",
                "chosen": f"Yes please, {thing} " + "and " * (i % 5),
                "rejected": f"No {thing} " + "or " * (i % 7),
                "margin": (i % 3) / 10,
            }
            file.write(json.dumps(pair) + "\n")
    return path


def settings(model: Path, data: Path, output_dir: Path, **changes: Any) -> dict[str, Any]:
    """Dotted settings of a training on two workers; `changes` use __ for the dot."""
    return {
        "model.path": model,
        "model.dtype": "float32",
        "data.train": data,
        "data.eval_fraction": 0.2,
        "optimizer.learning_rate": 0.01,
        "training.num_epochs": 3,
        "training.global_batch_pairs": 12,  # 39 pairs: the last batch of an epoch has 3
        "training.micro_batch_tokens": 120,
        "distributed.num_workers": 2,
        "distributed.device": "cpu",
        "output_dir": output_dir,
        **{key.replace("__", "."): value for key, value in changes.items()},
    }


def overrides(values: dict[str, Any]) -> list[tuple[str, str]]:
    return [(key, str(value)) for key, value in values.items()]


def log_of(output_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output_dir / "training_log.jsonl").open()]
