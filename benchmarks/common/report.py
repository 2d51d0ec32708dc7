"""From the seconds of every round to the figures, the JSON and the table."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.common.workloads import Workload, count_prefix_tokens

RESULTS = Path(__file__).resolve().parents[1] / "results"

_GIB = 1 << 30
_NOISE = 0.15
"""Greatest less least over the median: above this the machine was too noisy for a figure."""
_HEADINGS = (
    "workload",
    "peer",
    "median s",
    "min..max",
    "tokens/s",
    "x {first}",
    "least..most",
    "of matmul",
    "peak GiB",
    "max diff",
)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least, greatest and interquartile range; the last is 0 for a single value."""
    quartiles = statistics.quantiles(values, method="inclusive") if len(values) > 1 else [0.0] * 3
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "iqr": quartiles[2] - quartiles[0],
    }


def too_noisy(measured: Mapping[str, Sequence[float]]) -> list[str]:
    """What is measured by values that spread too far to tell, with how far."""
    found = []
    for name, values in measured.items():
        apart, median = max(values) - min(values), statistics.median(values)
        if apart > _NOISE * median:
            found.append(f"{name} ({apart / median:.0%})" if median else f"{name} (median 0)")
    return found


def print_noise(names: Sequence[str]) -> None:
    """Below a table: which of its figures say nothing."""
    if names:
        print(f"too noisy to tell (spread above {_NOISE:.0%}): {', '.join(names)}")


def max_abs_diff(rewards: Sequence[float], reference: Sequence[float]) -> float:
    """The largest difference between two lists of rewards; NaN if any reward is NaN."""
    differences = [abs(a - b) for a, b in zip(rewards, reference, strict=True)]
    return float("nan") if any(d != d for d in differences) else max(differences)


def summarize(
    workload: Workload,
    runs: Mapping[str, Sequence[Mapping[str, Any]]],
    layer_parameters: int,
    matmul_flops_per_s: float,
) -> dict[str, Any]:
    """One workload's figures for each peer from the measurements of its rounds.

    effective_tokens_per_s: tokens of the unshared sequences over the median time. ratio: the peer's
    time over that of the first peer, ours, in the same round. share_of_matmul: 2 x layer parameters
    x distinct prefix tokens, the least to multiply, over the median time, over the machine's own
    rate. cpu_seconds: of all threads; less than threads x seconds where something else had the
    cores.
    """
    num_prefix_tokens = count_prefix_tokens(workload.sequences)
    needed = 2.0 * layer_parameters * num_prefix_tokens
    ours_s = [run["seconds"] for run in next(iter(runs.values()))]
    peers = {}
    for peer, rounds in runs.items():
        seconds = [run["seconds"] for run in rounds]
        figures = spread(seconds)
        peers[peer] = {
            "seconds": seconds,
            "cpu_seconds": [run["cpu_seconds"] for run in rounds],
            **{f"{name}_s": value for name, value in figures.items()},
            "effective_tokens_per_s": workload.num_tokens / figures["median"],
            "ratio": spread([theirs / ours for theirs, ours in zip(seconds, ours_s, strict=True)]),
            "share_of_matmul": needed / figures["median"] / matmul_flops_per_s,
            "peak_memory_bytes": _most(run["peak_memory_bytes"] for run in rounds),
            "max_abs_diff": max(run["max_abs_diff"] for run in rounds),
            **{k: v for k, v in rounds[0].items() if k.startswith("num_")},
        }
    return {
        "settings": workload.settings,
        "num_sequences": len(workload.sequences),
        "num_tokens": workload.num_tokens,
        "num_prefix_tokens": num_prefix_tokens,
        "peers": peers,
    }


def table(workloads: Mapping[str, Mapping[str, Any]]) -> str:
    """The figures as plain text, one line for each workload and peer."""
    first = next(iter(next(iter(workloads.values()))["peers"]))
    rows = [tuple(heading.format(first=first) for heading in _HEADINGS)]
    for name, workload in workloads.items():
        for peer, figures in workload["peers"].items():
            ratio = figures["ratio"]
            rows.append(
                (
                    name,
                    peer,
                    f"{figures['median_s']:.3f}",
                    f"{figures['min_s']:.3f}..{figures['max_s']:.3f}",
                    f"{figures['effective_tokens_per_s']:,.0f}",
                    f"{ratio['median']:.2f}",
                    f"{ratio['min']:.2f}..{ratio['max']:.2f}",
                    f"{figures['share_of_matmul']:.2f}",
                    gib(figures["peak_memory_bytes"]),
                    f"{figures['max_abs_diff']:.1e}",
                )
            )
    return aligned(rows)


def _most(amounts: Iterable[int | None]) -> int | None:
    """None, something that could not be measured, makes all of it unknown."""
    known = list(amounts)
    return None if None in known else max(amount for amount in known if amount is not None)


def gib(num_bytes: int | None) -> str:
    return "unknown" if num_bytes is None else f"{num_bytes / _GIB:.2f}"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells in columns: the first two to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if index < 2 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def asked(arguments: Sequence[str] | None) -> dict[str, Any]:
    """When a run ended and how it was asked for: what its JSON begins with."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "arguments": list(sys.argv[1:] if arguments is None else arguments),
    }


def save(result: Mapping[str, Any], output: Path) -> None:
    """A run's figures as JSON."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")


def write(result: Mapping[str, Any], output: Path) -> None:
    save(result, output)
    print(f"written to {output}")


def heading(result: Mapping[str, Any], *more: str) -> str:
    """The machine and its rate of matrix products, above a table."""
    where = result["machine"].get("gpu", result["machine"]["cpu"])
    lines = [", ".join([where, result["dtype"], f"{result['threads']} threads", *more])]
    for product, rate in result["matmul"].items():
        lines.append(f"matmul {product}: {rate['median'] / 1e9:,.0f} GFLOP/s")
    return "\n".join(lines)
