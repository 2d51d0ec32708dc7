"""How fast rewards come out of servers: ours, vLLM's, plain Ray Serve, one request at a time.

    python -m benchmarks.serving --workload all --rounds 5

In every round each server is started, asked and ended in its turn; the load comes from a process of
its own. All servers hold the same weights, and their rewards are compared. README.md says how to
read it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common import machine
from benchmarks.common.arguments import positive, positive_float, seconds
from benchmarks.common.channel import ChildError
from benchmarks.common.processes import adopt_orphans, end_on_sigterm
from benchmarks.common.report import RESULTS, asked, print_noise, write
from benchmarks.common.rounds import TOLERANCES, Setting
from benchmarks.common.shapes import SHAPES
from benchmarks.common.workloads import Range
from benchmarks.serving import report
from benchmarks.serving.peers import NAMES, Peer, choose, make_peers, parse_sizes
from benchmarks.serving.turns import HALF, Times, Turn, Turns

if TYPE_CHECKING:
    from benchmarks.serving.workloads import Asked

WORKLOADS = ("groups", "singles", "empty", "handle", "start")
_OF_FULL_MODEL = ("groups", "singles", "start")


def main(arguments: list[str] | None = None) -> int:
    """Run, print, write the JSON. 1 when a server failed or gave other rewards, 2 for bad flags."""
    parser = make_parser()
    args = parser.parse_args(arguments)
    try:
        names, skipped = choose(args.peers)
        sizes = parse_sizes(args.ours)
    except ValueError as error:
        parser.error(str(error))
    wanted = args.workload or ["groups"]
    wanted = [name for name in WORKLOADS if name in wanted or "all" in wanted]
    preloads, missing = machine.find_preloads()
    if args.preload == "no":
        preloads, missing = [], []
    for name in missing:
        print(f"not preloaded: {name} is not installed; with it every server would be faster")
    for name, why in skipped.items():
        print(f"skipped: {name}: {why}")
    setting = Setting(args.shape, "cpu", args.dtype, args.threads, preloads)
    peers = make_peers(names, sizes, setting)
    order = turns_of(peers, wanted)
    if not order:
        parser.error(f"--peers {args.peers}: none of them takes {', '.join(wanted)}")
    adopt_orphans()
    end_on_sigterm()
    with tempfile.TemporaryDirectory() as scratch:
        now = "before the first round"
        try:
            turns = make_turns(args, setting, wanted, order, Path(scratch))
            for number in range(args.rounds):
                # vLLM is first in the first round: half of its capacity is a load of the others.
                shift = number % len(order)
                for turn in order[shift:] + order[:shift]:
                    now = f"round {number + 1}: {turn.peer.name}, {turn.model} model"
                    turns.run(turn)
                    print(now, flush=True)
        except (ChildError, ValueError) as error:
            print(f"failed: {now}: {error}", file=sys.stderr)
            return 1
    figures = report.summarize(turns.runs)
    result = {
        **asked(arguments),
        "machine": machine.describe_cpu(),
        "versions": machine.versions(),
        "shape": args.shape,
        "dtype": args.dtype,
        "threads": args.threads,
        "rounds": args.rounds,
        "preloads": [Path(path).name for path in preloads],
        "peers": {p.name: {"command": p.arguments, "environment": p.environment} for p in peers},
        "skipped": skipped,
        "half_load_requests_per_s": turns.rate,
        "largest_difference_of_rewards": turns.largest_diff,
        "measurements": figures,
        "targets": report.targets(figures),
        "too_noisy": report.noisy(figures),
    }
    print(f"\n{result['machine']['cpu']}, {args.dtype}, {args.threads} threads, {args.shape}\n")
    print(report.tables(figures, result["targets"]))
    print_noise(result["too_noisy"])
    output = args.output or RESULTS / f"serving-cpu-{args.dtype}.json"
    write(result, output)
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving", description=(__doc__ or "").split("\n")[0]
    )
    add = parser.add_argument
    ids: dict[str, Any] = {"type": Range.parse, "metavar": "N|MIN..MAX"}
    add(
        "--workload",
        action="append",
        choices=(*WORKLOADS, "all"),
        help="repeatable; default groups",
    )
    add("--shape", choices=SHAPES, default="79m", help="sizes of the random network")
    add("--dtype", choices=TOLERANCES, default="float32")
    add("--peers", default="all", help=f"of {','.join(NAMES)}; all: what can run here")
    sizes = "REPLICASxTHREADS of our server, with commas between; each is a peer of its own"
    add("--ours", default="1x2", help=sizes)
    add("--rounds", type=positive, default=5)
    add("--threads", type=positive, default=machine.available_threads(), help="of the other peers")
    add("--warm-up-s", type=seconds, default=8.0, help="load before a window")
    add("--duration-s", type=positive_float, default=30.0, help="a window")
    add("--group-size", type=positive, default=8)
    add("--prompt-tokens", default=Range(256, 256), **ids)
    add("--completion-tokens", default=Range(32, 256), **ids)
    add("--group-clients", type=positive, default=8, help="of groups, closed loop")
    add("--single-clients", type=positive, default=64, help="of singles")
    add("--empty-clients", type=positive, default=64, help="of empty, beside one alone")
    add("--num-groups", type=positive, default=384, help="distinct groups of groups and of singles")
    preload = "auto: tcmalloc and Intel's OpenMP for every server, where they are installed"
    add("--preload", choices=("auto", "no"), default="auto", help=preload)
    add("--output", type=Path, help="default: benchmarks/results/serving-cpu-DTYPE.json")
    return parser


def turns_of(peers: list[Peer], wanted: list[str]) -> list[Turn]:
    """One round: servers with the full model first, then those with the empty one."""
    order = []
    if set(wanted) & set(_OF_FULL_MODEL):
        for peer in peers:
            starts = "start" in wanted and peer.is_ours
            if starts or any(workload in wanted for workload in peer.protocols):
                order.append(Turn(peer, "full"))
    for peer in peers:
        is_asked = "empty" in wanted and "empty" in peer.protocols
        if is_asked or ("handle" in wanted and peer.is_ours):
            order.append(Turn(peer, "empty"))
    return order


def make_turns(
    args: argparse.Namespace,
    setting: Setting,
    wanted: list[str],
    order: list[Turn],
    scratch: Path,
) -> Turns:
    """Models and requests. Raises ValueError for sequences longer than the shape takes."""
    from benchmarks.serving.model import make_tokenizer, save_model, text_groups
    from benchmarks.serving.workloads import id_groups, singles

    shape = SHAPES[args.shape]
    lengths = args.prompt_tokens, args.completion_tokens
    requests: dict[str, list[Asked]] = {}
    if "groups" in wanted:
        for name in ("groups", HALF):
            requests[name] = id_groups(shape, args.num_groups, args.group_size, *lengths, name)
    if "singles" in wanted:
        tokenizer = make_tokenizer(shape)
        groups = text_groups(tokenizer, args.num_groups, args.group_size, *lengths, "singles")
        requests["singles"] = singles(tokenizer, groups)
    requests["empty"] = id_groups(SHAPES["tiny"], 64, 1, Range(2, 2), Range(2, 2), "empty")
    shapes = {"full": shape, "empty": SHAPES["tiny"]}
    models = {name: scratch / name for name in {turn.model for turn in order}}
    for name, directory in models.items():
        save_model(shapes[name], directory)
    clients = args.group_clients, args.single_clients, args.empty_clients
    times = Times(args.warm_up_s, args.duration_s, *clients)
    return Turns(setting, times, models, requests, wanted, scratch)


if __name__ == "__main__":
    sys.exit(main())
