"""How fast rewards are scored, beside padded batches, vLLM and variable-length attention.

    python -m benchmarks.scoring --workload grpo --workload unique --rounds 5

Every peer lives in its own process; they take turns round by round, in rotating order. All rewards
are compared with ours: a peer that gets other rewards ends the run. README.md says how to read it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import machine
from benchmarks.common.arguments import positive
from benchmarks.common.channel import ChildError
from benchmarks.common.report import (
    RESULTS,
    asked,
    heading,
    print_noise,
    save,
    spread,
    summarize,
    table,
    too_noisy,
    write,
)
from benchmarks.common.rounds import PEERS, TOLERANCES, Rounds, Setting, choose_peers
from benchmarks.common.shapes import SHAPES, Shape
from benchmarks.common.workloads import Range, Workload, grpo, real, unique

WORKLOADS = ("grpo", "grpo-long", "real", "pairs", "unique")


def main(arguments: list[str] | None = None) -> int:
    """Run, print, write the JSON. 1 when a peer failed or got other rewards, 2 for bad flags."""
    parser = make_parser()
    args = parser.parse_args(arguments)
    try:
        workloads = [make_workload(name, SHAPES[args.shape], args) for name in chosen(args)]
        device = args.device if args.device != "auto" else default_device()
        peers, skipped = choose_peers(args.peers, device)
        overrides = parse_overrides(args.vllm)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    preloads, missing = machine.find_preloads()
    if device != "cpu" or args.preload == "no":
        preloads, missing = [], []
    for name in missing:
        print(f"not preloaded: {name} is not installed; with it every peer would be faster")
    for name, why in skipped.items():
        print(f"skipped: {name}: {why}")
    setting = Setting(args.shape, device, args.dtype, args.threads, preloads, overrides)
    began = asked(arguments)
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        try:
            rounds = Rounds(setting, Path(scratch), stack)
            rounds.start_peers(peers, workloads)
            for number in range(args.rounds):
                rounds.run(number)
                print_round(rounds, number, args.rounds)
                result = {
                    **began,
                    **rounds.machine,
                    "device": device,
                    "threads": args.threads,
                    "preloads": [Path(path).name for path in preloads],
                    "shape": {
                        "name": args.shape,
                        "layer_parameters": SHAPES[args.shape].layer_parameters,
                    },
                    **figures(rounds, workloads, SHAPES[args.shape], number + 1),
                    "skipped": skipped,
                }
                default_name = f"scoring-{device.split(':')[0]}-{result['dtype']}.json"
                output = args.output or RESULTS / default_name
                if number + 1 < args.rounds:
                    save(result, output)  # of a run that is cut short, what it had
        except (ChildError, ValueError) as error:
            print(f"failed: {error}", file=sys.stderr)
            return 1
    print_result(result)
    write(result, output)
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scoring", description=(__doc__ or "").split("\n")[0]
    )
    add = parser.add_argument
    ids: dict[str, Any] = {"type": Range.parse, "metavar": "N|MIN..MAX"}
    add("--shape", choices=SHAPES, default="79m", help="sizes of the random network")
    add("--dtype", choices=("auto", *TOLERANCES), default="auto", help="auto: the device's fastest")
    add("--device", default="auto", help="auto: cuda where there is one, else cpu")
    add("--workload", action="append", choices=(*WORKLOADS, "all"), help="repeatable; default grpo")
    add("--peers", default="auto", help=f"of {','.join(PEERS)}; auto: all that can run here")
    add("--rounds", type=positive, default=5)
    add("--threads", type=positive, default=machine.available_threads())
    add("--groups", type=positive, default=8, help="groups of grpo")
    add("--group-size", type=positive, default=8, help="completions in a group of grpo")
    add("--prompt-tokens", default=Range(256, 256), help="of grpo and pairs", **ids)
    add("--completion-tokens", default=Range(32, 256), help="of grpo and pairs", **ids)
    add("--pairs", type=positive, default=32)
    add("--sequences", type=positive, default=48, help="sequences of unique")
    add("--sequence-tokens", default=Range(64, 768), help="of unique", **ids)
    add("--scale", type=positive, default=1, help="multiplies every workload but real")
    add("--real", type=Path, metavar="FILE", help="JSONL(.gz) of prompt and completions, for real")
    add("--max-groups", type=positive, default=4, help="groups of real")
    preload = "auto: tcmalloc and Intel's OpenMP for every peer, on a CPU that has them"
    add("--preload", choices=("auto", "no"), default="auto", help=preload)
    vllm = "an argument of vllm.LLM, or in upper case an environment variable; repeatable"
    add("--vllm", action="append", default=[], metavar="KEY=VALUE", help=vllm)
    add("--output", type=Path, help="default: benchmarks/results/scoring-DEVICE-DTYPE.json")
    return parser


def chosen(args: argparse.Namespace) -> list[str]:
    """Workloads without repetition; `all` leaves out `real` without its file. Raises ValueError."""
    names = args.workload or ["grpo"]
    if "all" in names:
        names = [name for name in WORKLOADS if name != "real" or args.real]
    if "real" in names and args.real is None:
        raise ValueError("the workload real needs --real FILE")
    return list(dict.fromkeys(names))


def make_workload(name: str, shape: Shape, args: argparse.Namespace) -> Workload:
    """Raises ValueError if a sequence would be longer than the shape takes."""
    lengths = args.prompt_tokens, args.completion_tokens
    match name:
        case "grpo":
            return grpo(shape, args.groups * args.scale, args.group_size, *lengths)
        case "grpo-long":
            long = Range(1024, 1024), Range(64, 512)
            return grpo(shape, 2 * args.scale, 16, *long, name=name)
        case "pairs":
            return grpo(shape, args.pairs * args.scale, 2, *lengths, name=name)
        case "unique":
            return unique(shape, args.sequences * args.scale, args.sequence_tokens)
    assert name == "real", name
    return real(shape, args.real, args.max_groups)


def default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def parse_overrides(texts: list[str]) -> dict[str, Any]:
    """KEY=VALUE, the value as JSON where it is, else as text. Raises ValueError."""
    overrides: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--vllm: {text!r} is not KEY=VALUE")
        try:
            overrides[key] = json.loads(value)
        except json.JSONDecodeError:
            overrides[key] = value
    return overrides


def figures(
    rounds: Rounds, workloads: list[Workload], shape: Shape, num_rounds: int
) -> dict[str, Any]:
    """The measured part of the JSON."""
    rates = {
        product: [measured[product] for measured in rounds.matmul] for product in rounds.matmul[0]
    }
    matmul = {product: spread(values) for product, values in rates.items()}
    # On a GPU the small product cannot fill the device: the best rate is what it can do.
    rate = max(values["median"] for values in matmul.values())
    return {
        "rounds": num_rounds,
        "matmul_flops_per_s": rate,
        "matmul": {
            product: {"flops_per_s": rates[product], **values} for product, values in matmul.items()
        },
        "tolerance": TOLERANCES[rounds.machine["dtype"]],
        "peers": rounds.peers,
        "workloads": {
            workload.name: summarize(
                workload, rounds.runs[workload.name], shape.layer_parameters, rate
            )
            for workload in workloads
        },
        "too_noisy": too_noisy(
            {
                f"{mode} on {workload}": [run["seconds"] for run in runs]
                for workload, by_mode in rounds.runs.items()
                for mode, runs in by_mode.items()
            }
        ),
    }


def print_round(rounds: Rounds, number: int, num_rounds: int) -> None:
    for workload, runs in rounds.runs.items():
        said = ", ".join(f"{mode} {runs[mode][-1]['seconds']:.3f} s" for mode in runs)
        print(f"round {number + 1} of {num_rounds}, {workload}: {said}", flush=True)


def print_result(result: dict[str, Any]) -> None:
    print(f"\n{heading(result)}")
    print(table(result["workloads"]))
    print_noise(result["too_noisy"])


if __name__ == "__main__":
    sys.exit(main())
