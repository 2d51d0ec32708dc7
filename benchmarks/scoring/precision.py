"""How far a reward moves in company, for every family, in float32 and in bfloat16.

    python -m benchmarks.scoring.precision --output benchmarks/results/precision-cpu.json

Tiny random networks (tests/helpers/families.py), a few hundred sequences in groups, on the CPU or
with `--device cuda` on a GPU. The columns of its table, each a largest absolute difference
between scores whose standard deviation is about 1:

    float32            alone against in a batch, on the path that the probe chose
    bfloat16           the same in bfloat16
    bfloat16 padded    the same on the padded path: the family's own alone-against-batch noise
    rounding           bfloat16 against float32, both on the padded path
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from benchmarks.common import machine
from reward_actor.engine.engine import Engine
from reward_actor.model.reward_model import RewardModel
from tests.helpers.families import FAMILIES, VOCAB_SIZE, make_network

if TYPE_CHECKING:
    from numpy.typing import NDArray


def groups(num_groups: int, seed: int = 0) -> list[list[int]]:
    """Groups of 4 under one system prompt; prompts of 3 to 150 tokens, completions of 1 to 60."""
    generate = random.Random(seed)

    def some(low: int, high: int) -> list[int]:
        return [generate.randrange(VOCAB_SIZE) for _ in range(generate.randint(low, high))]

    system = some(4, 4)
    prompts = [system + some(3, 150) for _ in range(num_groups)]
    return [prompt + some(1, 60) for prompt in prompts for _ in range(4)]


def in_company(engine: Engine, sequences: list[list[int]]) -> tuple[float, NDArray[np.float32]]:
    """The largest difference between alone and in a batch, and the scores in the batch."""
    together = engine.raw_scores(sequences)[:, 0]
    alone = np.array([engine.raw_scores([sequence])[0, 0] for sequence in sequences])
    return float(np.abs(together - alone).max()), together


def measure(family: str, sequences: list[list[int]], device: str) -> dict[str, Any]:
    full = RewardModel(make_network(family).to(device)).eval()
    exact = Engine(full, "padded").raw_scores(sequences)[:, 0]
    engine = Engine(full)
    engine.freeze()
    float32, _ = in_company(engine, sequences)
    half = RewardModel(make_network(family).to(device, torch.bfloat16)).eval()
    bfloat16, _ = in_company(Engine(half), sequences)
    padded, rounded = in_company(Engine(half, "padded"), sequences)
    return {
        "path": engine.path,
        "float32": float32,
        "bfloat16": bfloat16,
        "bfloat16_padded": padded,
        "rounding": float(np.abs(rounded - exact).max()),
        "score_std": float(exact.std()),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--groups", type=int, default=48, help="groups of 4 sequences")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    sequences = groups(args.groups)
    print(f"{len(sequences)} sequences; largest differences\n")
    print("| family | path | float32 | bfloat16 | bfloat16 padded | rounding |")
    print("|---|---|---|---|---|---|")
    families = {}
    for family in FAMILIES:
        row = families[family] = measure(family, sequences, args.device)
        print(
            f"| {family} | {row['path']} | {row['float32']:.1e} | {row['bfloat16']:.4f} "
            f"| {row['bfloat16_padded']:.4f} | {row['rounding']:.4f} |",
            flush=True,
        )
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        report = {
            "machine": machine.describe_cpu(),
            "versions": machine.versions(),
            "device": args.device,
            "num_sequences": len(sequences),
            "families": families,
        }
        args.output.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
