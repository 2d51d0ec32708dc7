"""Plausible lines of a training's logs."""

from __future__ import annotations

import math
import random
from typing import Any


def step_line(step: int, num_steps: int = 200, seed: int = 0) -> dict[str, Any]:
    """A plausible line of a training log; the same for the same arguments."""
    noise = random.Random(step * 1000 + seed)
    learnt = 1 - math.exp(-4 * step / num_steps)
    margin = 1.6 * learnt + noise.gauss(0, 0.15)
    return {
        "step": step,
        "epoch": 0,
        "loss": 0.69 - 0.32 * learnt + noise.gauss(0, 0.05),
        "accuracy": min(1.0, max(0.0, 0.5 + 0.32 * learnt + noise.gauss(0, 0.06))),
        "raw_margin": margin,
        "min_raw_score": -3.0 * learnt - 0.2,
        "mean_raw_score": 0.1 * learnt,
        "max_raw_score": 3.0 * learnt + 0.2,
        "learning_rate": 2e-3 * (1 - step / (num_steps + 1)),
        "grad_norm": 1.0 + noise.random(),
        "pairs_per_s": 55 + noise.random() * 8,
        "tokens_per_s": 12_000 + noise.random() * 900,
        "memory_mb": 1204.5,
        "padding_saved": 0.38 + noise.random() * 0.05,
        "num_pairs": 64,
    }


def evaluation_line(step: int, num_steps: int = 200) -> dict[str, Any]:
    accuracy = 0.5 + 0.3 * (1 - math.exp(-4 * step / num_steps))
    return {
        "step": step,
        "num_pairs": 450,
        "num_ties": 0,
        "accuracy": accuracy,
        "accuracy_low": accuracy - 0.035,
        "accuracy_high": accuracy + 0.033,
        "raw_margin": 3 * (accuracy - 0.5),
        "log_loss": 0.69 - 0.9 * (accuracy - 0.5),
        "calibration_error": 0.04,
        "length_correlation": None,
        "subsets": {"math": {"num_pairs": 200, "accuracy": 0.7, "raw_margin": 0.4}},
    }
