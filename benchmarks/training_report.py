"""From the steps of every round to the check of their losses, the figures and the table."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.report import aligned, max_abs_diff, spread
from benchmarks.training_peers import PEERS, Step

_GIB = 1 << 30
_HEADINGS = (
    "workload", "peer", "median s", "min..max", "pair tokens/s", "x ours", "computed tokens",
    "of matmul", "peak GiB", "step GiB", "max diff",
)  # fmt: skip


@dataclass
class Measured:
    """One workload: for each round what was asked for, and each peer's step."""

    settings: dict[str, Any]
    num_pairs: int
    """Of one step."""
    memory: dict[str, dict[str, int]] = field(default_factory=dict)
    num_tokens: list[int] = field(default_factory=list)
    """Of both sides of all pairs of a round: the useful ones."""
    num_distinct_tokens: list[int] = field(default_factory=list)
    steps: dict[str, list[Step]] = field(default_factory=lambda: {peer: [] for peer in PEERS})


def disagreement(step: Step, reference: Step) -> float:
    """The largest difference between two peers' losses of a pair, or, if that is larger, between
    their gradients' norms, relative to the norm; NaN if anything is NaN."""
    of_losses = max_abs_diff(step.losses, reference.losses)
    of_norms = abs(step.grad_norm - reference.grad_norm) / reference.grad_norm
    return float("nan") if of_norms != of_norms else max(of_losses, of_norms)


def check(peers: Mapping[str, Step], tolerance: float) -> float:
    """The largest disagreement of a round's steps with ours.

    Raises ValueError naming a peer that is further off than `tolerance`.
    """
    worst = 0.0
    for peer, step in peers.items():
        difference = disagreement(step, peers["ours"])
        if not difference <= tolerance:  # NaN fails, too
            raise ValueError(
                f"losses or gradients of {peer} differ from ours by {difference:.3g}; "
                f"{tolerance:g} is tolerated"
            )
        worst = max(worst, difference)
    return worst


def summarize(
    measured: Measured, flops_per_token: int, matmul_flops_per_s: float
) -> dict[str, Any]:
    """One workload's figures.

    ratio: a peer's seconds over ours in the same round, on the same pairs. pair_tokens_per_s:
    tokens of both sides of all pairs over the seconds of the round. share_of_matmul: the products
    of the tokens that were computed, padding included, over the seconds, over the machine's own
    rate; share_of_matmul_needed: the same of the distinct tokens, the least to compute. Of each the
    median over the rounds. num_*: sums over the rounds.
    """
    ours = measured.steps["ours"]
    most = matmul_flops_per_s / flops_per_token  # tokens a second
    peers = {}
    for peer, steps in measured.steps.items():
        seconds = [step.seconds for step in steps]
        tokens = [step.num_computed_tokens for step in steps]
        ratios = [step.seconds / mine.seconds for step, mine in zip(steps, ours, strict=True)]
        peers[peer] = {
            "seconds": seconds,
            "cpu_seconds": [step.cpu_seconds for step in steps],
            **{f"{name}_s": value for name, value in spread(seconds).items()},
            "ratio": spread(ratios),
            "pair_tokens_per_s": _median_rate(measured.num_tokens, seconds),
            "num_computed_tokens": sum(tokens),
            "share_of_matmul": _median_rate(tokens, seconds) / most,
            "share_of_matmul_needed": _median_rate(measured.num_distinct_tokens, seconds) / most,
            **measured.memory[peer],
            "max_difference": max(map(disagreement, steps, ours)),
        }
    return {
        "settings": measured.settings,
        "num_pairs_per_step": measured.num_pairs,
        "num_tokens": sum(measured.num_tokens),
        "num_distinct_tokens": sum(measured.num_distinct_tokens),
        "losses": [statistics.fmean(step.losses) for step in ours],
        "grad_norms": [step.grad_norm for step in ours],
        "peers": peers,
    }


def _median_rate(amounts: Sequence[int], seconds: Sequence[float]) -> float:
    return statistics.median(a / s for a, s in zip(amounts, seconds, strict=True))


def table(workloads: Mapping[str, Mapping[str, Any]]) -> str:
    """The figures as plain text, one line for each workload and peer."""
    rows = [_HEADINGS]
    for name, workload in workloads.items():
        for peer, figures in workload["peers"].items():
            rows.append(
                (
                    name,
                    peer,
                    f"{figures['median_s']:.3f}",
                    f"{figures['min_s']:.3f}..{figures['max_s']:.3f}",
                    f"{figures['pair_tokens_per_s']:,.0f}",
                    f"{figures['ratio']['median']:.2f}",
                    f"{figures['num_computed_tokens']:,}",
                    f"{figures['share_of_matmul']:.2f}",
                    f"{figures['peak_memory_bytes'] / _GIB:.2f}",
                    f"{figures['step_memory_bytes'] / _GIB:.2f}",
                    f"{figures['max_difference']:.1e}",
                )
            )
    counts = [
        f"{name}: {workload['num_tokens']:,} tokens of pairs, "
        f"{workload['num_distinct_tokens']:,} distinct, in all rounds"
        for name, workload in workloads.items()
    ]
    return "\n".join([aligned(rows), *counts])
