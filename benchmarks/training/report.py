"""From the steps of every round to the check of their losses, the figures and the table."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from benchmarks.common.report import aligned, gib, max_abs_diff, spread, too_noisy
from benchmarks.training.peers import PEERS, Step

_HEADINGS = (
    "workload", "peer", "median s", "min..max", "pair tokens/s", "x ours", "computed tokens",
    "of matmul", "peak GiB", "step GiB", "loss diff", "norm diff",
)  # fmt: skip


class Differences(NamedTuple):
    """Between two peers' steps over the same pairs, or how much of it is tolerated."""

    pair_loss: float
    """The largest one of a pair's losses."""
    mean_loss: float
    grad_norm: float
    """Relative to the norm."""


# float32 leaves the order of summation. bfloat16 rounds a pair's rewards to three digits, as in
# scoring; the mean of the losses and the norm of the gradient average that out.
TOLERANCES = {
    "float32": Differences(1e-4, 1e-4, 1e-4),
    "bfloat16": Differences(0.25, 2e-2, 2e-2),
}


@dataclass
class Measured:
    """One workload: for each round what was asked for, and each peer's step."""

    settings: dict[str, Any]
    num_pairs: int
    """Of one step."""
    memory: dict[str, dict[str, int | None]] = field(default_factory=dict)
    num_tokens: list[int] = field(default_factory=list)
    """Of both sides of all pairs of a round: the useful ones."""
    num_distinct_tokens: list[int] = field(default_factory=list)
    steps: dict[str, list[Step]] = field(default_factory=lambda: {peer: [] for peer in PEERS})


def disagreement(step: Step, reference: Step) -> Differences:
    """NaN where anything is NaN."""
    return Differences(
        max_abs_diff(step.losses, reference.losses),
        abs(statistics.fmean(step.losses) - statistics.fmean(reference.losses)),
        abs(step.grad_norm - reference.grad_norm) / reference.grad_norm,
    )


def check(peers: Mapping[str, Step], tolerance: Differences) -> Differences:
    """The largest differences of a round's steps from ours.

    Raises ValueError naming a peer that is further off than `tolerance`, and by what.
    """
    found = {peer: disagreement(step, peers["ours"]) for peer, step in peers.items()}
    for peer, differences in found.items():
        for name, difference, most in zip(Differences._fields, differences, tolerance, strict=True):
            if not difference <= most:  # NaN fails, too
                raise ValueError(
                    f"{name} of {peer} differs from ours by {difference:.3g}; {most:g} is tolerated"
                )
    return _largest(found.values())


def _largest(differences: Iterable[Differences]) -> Differences:
    return Differences(*map(max, zip(*differences, strict=True)))


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
            "max_difference": _largest(map(disagreement, steps, ours))._asdict(),
        }
    return {
        "settings": measured.settings,
        "num_pairs_per_step": measured.num_pairs,
        "num_tokens": sum(measured.num_tokens),
        "num_distinct_tokens": sum(measured.num_distinct_tokens),
        "losses": [statistics.fmean(step.losses) for step in ours],
        "grad_norms": [step.grad_norm for step in ours],
        "peers": peers,
        # Tokens a second: the rounds have other pairs.
        "too_noisy": too_noisy(
            {
                peer: [step.num_computed_tokens / step.seconds for step in steps]
                for peer, steps in measured.steps.items()
            }
        ),
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
                    gib(figures["peak_memory_bytes"]),
                    gib(figures["step_memory_bytes"]),
                    f"{figures['max_difference']['mean_loss']:.1e}",
                    f"{figures['max_difference']['grad_norm']:.1e}",
                )
            )
    counts = [
        f"{name}: {workload['num_tokens']:,} tokens of pairs, "
        f"{workload['num_distinct_tokens']:,} distinct, in all rounds"
        for name, workload in workloads.items()
    ]
    return "\n".join([aligned(rows), *counts])
