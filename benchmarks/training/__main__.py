"""How fast pairs train a reward model: padded, padded and sorted by length, and ours.

    python -m benchmarks.training --hh hh_harmless_pairs.jsonl.gz --rounds 5

All peers take their optimizer steps on one engine and one network, in one process, round by round
in rotating order, over the same pairs. Losses and gradient norms are compared with ours: a peer
that gets others ends the run. README.md says how to read it.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import statistics
import sys
import tempfile
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import probe
from benchmarks.common.arguments import positive
from benchmarks.common.channel import Answer
from benchmarks.common.machine import available_threads
from benchmarks.common.report import RESULTS, asked, heading, print_noise, spread, write
from benchmarks.common.shapes import SHAPES, build_network
from benchmarks.common.workloads import Range
from benchmarks.training.engines import ZERO_STAGE, Engine, deepspeed_engine, torch_engine
from benchmarks.training.pairs import PairWorkload, real, synthetic
from benchmarks.training.peers import MICRO_BATCH_PAIRS, PEERS, Peers, Step, measure_memory
from benchmarks.training.profile import profile_step, profile_table
from benchmarks.training.report import TOLERANCES, Differences, Measured, check, summarize, table


def main(arguments: list[str] | None = None) -> int:
    """Run, print, write the JSON. 1 when a peer failed or got other losses, 2 for bad flags."""
    parser = make_parser()
    args = parser.parse_args(arguments)
    if args.engine == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        parser.error("deepspeed is not installed; --engine torch needs none")
    try:
        workloads = make_workloads(args)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    order = {name: getattr(args, name) for name in ("shape", "device", "dtype", "threads")}
    found, matmul = probe.load(order)
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        try:
            engine = make_engine(args, found["device"], found["dtype"], Path(scratch))
            stack.callback(engine.close)
            figures = measure(args, workloads, engine, TOLERANCES[found["dtype"]], matmul)
        except ValueError as error:
            print(f"failed: {error}", file=sys.stderr)
            return 1
    preloads = filter(None, os.environ.get("LD_PRELOAD", "").split(":"))
    result = {
        **asked(arguments),
        **found,
        "versions": {**found["versions"], **more_versions()},
        "threads": args.threads,
        "preloads": [Path(path).name for path in preloads],
        "shape": {"name": args.shape, "layer_parameters": SHAPES[args.shape].layer_parameters},
        "engine": args.engine if args.engine == "torch" else f"deepspeed, ZeRO {ZERO_STAGE}",
        "lora_rank": args.lora,
        "micro_batch_pairs": MICRO_BATCH_PAIRS,
        "micro_batch_tokens": args.micro_batch_tokens,
        **figures,
    }
    output = args.output or default_output(args, found)
    print_result(result)
    write(result, output)
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training", description=(__doc__ or "").split("\n")[0]
    )
    add = parser.add_argument
    ids: dict[str, Any] = {"type": Range.parse, "metavar": "N|MIN..MAX"}
    pairs = "JSONL(.gz) of chosen and rejected, with or without prompt"
    add("--hh", type=Path, metavar="FILE", help=f"workload hh: {pairs}")
    add("--alpaca", type=Path, metavar="FILE", help=f"workload alpaca: {pairs}")
    add("--synthetic", action="store_true", help="random ids; the default without a file")
    add("--prompt-tokens", default=Range(256, 256), help="of synthetic", **ids)
    add("--chosen-tokens", default=Range(32, 256), help="of synthetic", **ids)
    add("--rejected-tokens", default=Range(32, 256), help="of synthetic", **ids)
    add("--pairs", type=positive, default=16, help="of one optimizer step")
    add("--rounds", type=positive, default=5)
    add("--shape", choices=SHAPES, default="79m", help="sizes of the random network")
    add("--engine", choices=("deepspeed", "torch"), default="deepspeed")
    lora = "train adapters of this rank and the head only; default: everything"
    add("--lora", type=positive, default=0, metavar="RANK", help=lora)
    add("--micro-batch-tokens", type=positive, default=8192, help="of ours")
    add("--dtype", choices=("auto", *TOLERANCES), default="auto", help="auto: the device's fastest")
    add("--device", default="auto", help="auto: cuda where there is one, else cpu")
    add("--threads", type=positive, default=available_threads())
    add("--profile", action="store_true", help="one more step of ours: where its time goes")
    output = "default: benchmarks/results/training-SHAPE-DEVICE-DTYPE.json"
    add("--output", type=Path, help=output)
    return parser


def make_workloads(args: argparse.Namespace) -> list[PairWorkload]:
    """With pairs for every round and the step before them. Raises ValueError."""
    shape = SHAPES[args.shape]
    num_pairs = (args.rounds + 1) * args.pairs
    files = {"hh": args.hh, "alpaca": args.alpaca}
    workloads = [real(name, shape, path, num_pairs) for name, path in files.items() if path]
    if args.synthetic or not workloads:
        lengths = args.prompt_tokens, args.chosen_tokens, args.rejected_tokens
        workloads.append(synthetic(shape, num_pairs, *lengths))
    return workloads


def make_engine(args: argparse.Namespace, device: str, dtype: str, scratch: Path) -> Engine:
    network = build_network(SHAPES[args.shape], getattr(torch, dtype), device)
    if args.engine == "torch":
        return torch_engine(network, args.lora)
    return deepspeed_engine(network, args.micro_batch_tokens, args.lora, scratch)


def measure(
    args: argparse.Namespace,
    workloads: list[PairWorkload],
    engine: Engine,
    tolerance: Differences,
    matmul: Answer,
) -> dict[str, Any]:
    """The measured part of the JSON. Raises ValueError when a peer gets other losses than ours."""
    peers = Peers(engine, args.micro_batch_tokens)
    measured = {w.name: warm_up(peers, w, args, engine) for w in workloads}
    rates = []
    for number in range(args.rounds):
        rates.append(matmul({}))
        for workload in workloads:
            steps = take_turns(peers, workload, measured[workload.name], number, args.pairs)
            difference = check(steps, tolerance)
            print_round(steps, workload.name, number, args.rounds, difference)
    profiles = {}
    for workload in workloads if args.profile else ():
        chosen = workload.step(args.rounds, args.pairs)
        step = partial(peers.step, "ours", workload.pairs, chosen)
        profiles[workload.name] = profile_step(step, engine.device)
    by_product = {product: [some[product] for some in rates] for product in rates[0]}
    spreads = {product: spread(values) for product, values in by_product.items()}
    # On a GPU the small product cannot fill the device: the best rate is what it can do.
    rate = max(values["median"] for values in spreads.values())
    flops_per_token = engine.flops_per_token()
    return {
        "flops_per_token": flops_per_token,
        "rounds": args.rounds,
        "matmul_flops_per_s": rate,
        "matmul": {p: {"flops_per_s": by_product[p], **spreads[p]} for p in spreads},
        "tolerance": tolerance._asdict(),
        "workloads": {
            name: summarize(some, flops_per_token, rate) for name, some in measured.items()
        },
        "profiles": profiles,
    }


def warm_up(
    peers: Peers, workload: PairWorkload, args: argparse.Namespace, engine: Engine
) -> Measured:
    """A step that is not timed: each peer's memory, on pairs of which no round has any."""
    chosen = workload.step(args.rounds, args.pairs)
    peers.step("ours", workload.pairs, chosen[:1])  # makes the optimizer's state
    measured = Measured(workload.settings, args.pairs)
    for peer in PEERS:
        step = partial(peers.step, peer, workload.pairs, chosen)
        measured.memory[peer] = measure_memory(step, engine.device)
    print(f"warmed up: {workload.name}", flush=True)
    return measured


def take_turns(
    peers: Peers, workload: PairWorkload, measured: Measured, number: int, num_pairs: int
) -> dict[str, Step]:
    """Round `number` of a workload; the first peer is another one each round."""
    chosen = workload.step(number, num_pairs)
    shift = number % len(PEERS)
    order = PEERS[shift:] + PEERS[:shift]
    steps = {peer: peers.step(peer, workload.pairs, chosen) for peer in order}
    for peer, step in steps.items():
        measured.steps[peer].append(step)
    measured.num_tokens.append(workload.pairs.num_tokens(chosen))
    measured.num_distinct_tokens.append(workload.num_distinct_tokens(chosen))
    return steps


def more_versions() -> dict[str, str]:
    """Of what only training needs, where it is installed."""
    names = [n for n in ("deepspeed", "peft") if importlib.util.find_spec(n) is not None]
    return {name: metadata.version(name) for name in names}


def default_output(args: argparse.Namespace, found: dict[str, Any]) -> Path:
    shape = f"{args.shape}-lora" if args.lora else args.shape
    name = f"training-{shape}-{found['device'].split(':')[0]}-{found['dtype']}.json"
    return RESULTS / name


def print_round(
    steps: dict[str, Step], workload: str, number: int, num_rounds: int, difference: Differences
) -> None:
    said = ", ".join(f"{peer} {steps[peer].seconds:.3f} s" for peer in PEERS)
    loss = statistics.fmean(steps["ours"].losses)
    print(
        f"round {number + 1} of {num_rounds}, {workload}: {said}; "
        f"loss {loss:.6f}, off by {difference.mean_loss:.1e}, gradients' norm by "
        f"{difference.grad_norm:.1e}",
        flush=True,
    )


def print_result(result: dict[str, Any]) -> None:
    print(f"\n{heading(result, result['engine'])}")
    print(table(result["workloads"]))
    print_noise(
        [
            f"{peer} on {name}"
            for name, figures in result["workloads"].items()
            for peer in figures["too_noisy"]
        ]
    )
    for name, profiled in result["profiles"].items():
        print(f"\nours, {name}, one profiled step: {profiled['seconds']:.3f} s")
        print(profile_table(profiled))


if __name__ == "__main__":
    sys.exit(main())
