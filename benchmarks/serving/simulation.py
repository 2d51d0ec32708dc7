"""How the service scales beyond this machine: its real ingress and batchers, replicas that sleep.

    python -m benchmarks.serving.simulation --tokens-per-s 9000
    python -m benchmarks.serving.simulation --results benchmarks/results/serving-cpu-float32.json

Two tables. Scaling: clients in a closed loop call the ASGI application of one ingress, whose 1 to
64 replicas take the measured time per token. Ingress: replicas that take no time, and the CPU time
that the ingress spends on a token, by the kind of body: the tokens/s that one core of it carries.
Neither Ray nor the HTTP server's parsing is in it; `benchmarks.serving` measures an ingress with
both.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import json
import os
import pstats
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from benchmarks.common import machine
from benchmarks.common.arguments import positive, positive_float, seconds
from benchmarks.common.report import RESULTS, asked, write
from benchmarks.common.shapes import SHAPES, Shape
from benchmarks.common.workloads import Range
from benchmarks.serving.load import Record, Request, summarize
from benchmarks.serving.model import make_tokenizer, text_groups
from benchmarks.serving.report import markdown
from benchmarks.serving.simulated_replicas import SimulatedReplicas, describe
from benchmarks.serving.workloads import PROTOCOLS, id_groups, singles, text_requests
from serve.api import build_api
from serve.config import ServeConfig
from serve.ingress.service import RewardService
from serve.ingress.swap import Swapper

if TYPE_CHECKING:
    from serve.wire import Description

_GOAL = 0.9
# A core that is busier than this is what limits.
_SATURATED = 0.9
_PAUSE_S = 0.05


@dataclass(frozen=True)
class Window:
    """Seconds of load before the window and in it."""

    warm_up_s: float
    duration_s: float


def main(arguments: list[str] | None = None) -> int:
    """Run, print, write the JSON. 2 for bad flags."""
    parser = make_parser()
    args = parser.parse_args(arguments)
    try:
        tokens_per_s = args.tokens_per_s or measured_rate(args.results)
    except (OSError, ValueError) as error:
        parser.error(f"no rate of a replica: {error}; give --tokens-per-s or --results")
    shape = SHAPES[args.shape]
    kinds = bodies(shape, args.num_groups, args.prompt_tokens, args.completion_tokens)
    window = Window(args.warm_up_s, args.duration_s)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # as servers in benchmarks.serving
    with tempfile.TemporaryDirectory() as scratch:
        description = describe(shape, Path(scratch))
        rows = []
        for num_replicas in args.replicas:
            clients = num_replicas * args.clients_per_replica
            row = run(
                description, num_replicas, 1 / tokens_per_s, clients, kinds[args.body], window
            )
            rows.append({"num_replicas": num_replicas, **row})
            print(f"{num_replicas} replicas: {row['tokens_per_s']:,.0f} tokens/s", flush=True)
        costs = {
            kind: run(description, 1, 0.0, args.ingress_clients, requests, window)
            for kind, requests in kinds.items()
        }
        if args.profile:
            profile = cProfile.Profile()
            requests = kinds[args.body]
            run(description, 1, 0.0, args.ingress_clients, requests, window, profile)
            pstats.Stats(profile).sort_stats("tottime").print_stats(30)
    result = {
        **asked(arguments),
        "machine": machine.describe_cpu(),
        "versions": machine.versions(),
        "replica_tokens_per_s": tokens_per_s,
        "body": args.body,
        "scaling": with_shares(rows),
        "ingress": costs,
    }
    print(f"\n{tables(result)}")
    write(result, args.output or RESULTS / "serving-simulation.json")
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    ids: dict[str, Any] = {"type": Range.parse, "metavar": "N|MIN..MAX"}
    rate = "effective tokens/s of one replica; default: from --results"
    add("--tokens-per-s", type=positive_float, help=rate)
    measured = RESULTS / "serving-cpu-float32.json"
    add("--results", type=Path, default=measured, help="of benchmarks.serving")
    add("--shape", choices=SHAPES, default="79m", help="whose vocabulary and lengths")
    add("--replicas", type=positive, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    add("--clients-per-replica", type=positive, default=8, help="closed loop, a group a request")
    add("--ingress-clients", type=positive, default=32, help="of the second table")
    add("--body", choices=_KINDS, default="ids, JSON", help="of the first table")
    add("--num-groups", type=positive, default=128)
    add("--prompt-tokens", default=Range(256, 256), **ids)
    add("--completion-tokens", default=Range(32, 256), **ids)
    add("--warm-up-s", type=seconds, default=5.0)
    add("--duration-s", type=positive_float, default=10.0)
    add("--profile", action="store_true", help="print where the ingress's time goes")
    add("--output", type=Path, help="default: benchmarks/results/serving-simulation.json")
    return parser


_KINDS = ("ids, binary", "ids, JSON", "text", "single texts")


def bodies(
    shape: Shape, num_groups: int, prompt: Range, completion: Range
) -> dict[str, list[Request]]:
    """Requests of each kind of body: a group of 8, or one text."""
    native, binary = PROTOCOLS["native"], PROTOCOLS["binary"]
    ids = id_groups(shape, num_groups, 8, prompt, completion, "simulation")
    tokenizer = make_tokenizer(shape)
    texts = text_groups(tokenizer, num_groups, 8, prompt, completion, "simulation")
    return {
        "ids, binary": [binary.request(each) for each in ids],
        "ids, JSON": [native.request(each) for each in ids],
        "text": [native.request(each) for each in text_requests(tokenizer, texts)],
        "single texts": [native.request(each) for each in singles(tokenizer, texts)],
    }


def measured_rate(path: Path) -> float:
    """Effective tokens/s of one of our replicas at full load. Raises OSError or ValueError."""
    figures = json.loads(path.read_text())["measurements"].get("groups", {})
    rates = [
        numbers["tokens_per_s"]["median"]
        for label, numbers in figures.items()
        if label.startswith("ours_1x")
    ]
    if not rates:
        raise ValueError(f"{path} has no groups scored by one replica of ours")
    return float(max(rates))


def run(
    description: Description,
    num_replicas: int,
    s_per_token: float,
    num_clients: int,
    requests: Sequence[Request],
    window: Window,
    profile: cProfile.Profile | None = None,
) -> dict[str, Any]:
    """One load on one ingress; its figures with the share of a core that it took, clients and all.

    ingress_tokens_per_s: what it carried, over that share.
    """
    replicas = SimulatedReplicas(description, num_replicas, s_per_token)
    try:
        if profile is not None:
            profile.enable()
        return asyncio.run(_load(replicas, num_clients, requests, window))
    finally:
        if profile is not None:
            profile.disable()
        replicas.close()


async def _load(
    replicas: SimulatedReplicas, num_clients: int, requests: Sequence[Request], window: Window
) -> dict[str, Any]:
    config = ServeConfig.model_validate({"model": "simulated", "name": "simulated"})
    service = RewardService(config, cast("Any", replicas), "simulated", "simulated")
    api = build_api(service, Swapper(service.replicas, "simulated", config))
    await service.model()  # knows its replicas from now on
    records: list[Record] = []
    begin = time.monotonic() + window.warm_up_s
    end = begin + window.duration_s

    async def ask_on(first: int) -> None:
        index = first
        while True:
            request = requests[index % len(requests)]
            index += num_clients
            due = time.monotonic()
            status = await call(api, request)
            records.append(Record(due, time.monotonic(), status, request.num_tokens))
            if status != 200:
                await asyncio.sleep(_PAUSE_S)

    clients = [asyncio.create_task(ask_on(first)) for first in range(num_clients)]
    await asyncio.sleep(begin - time.monotonic())
    # Rendering and tokenising may take other threads than the loop's.
    cpu_s, begin = time.process_time() - replicas.cpu_seconds(), time.monotonic()
    await asyncio.sleep(end - time.monotonic())
    cpu_s, end = time.process_time() - replicas.cpu_seconds() - cpu_s, time.monotonic()
    # What has begun within the window still counts; the clients go on meanwhile.
    longest = max((r.done - r.due for r in records), default=0.0)
    await asyncio.sleep(min(2 * longest, window.duration_s))
    for client in clients:
        client.cancel()
    for outcome in await asyncio.gather(*clients, return_exceptions=True):
        if isinstance(outcome, Exception):
            raise outcome
    figures = summarize(records, begin, end)
    share = cpu_s / (end - begin)
    return {
        **figures,
        "ingress_cpu_share": share,
        "ingress_tokens_per_s": figures["tokens_per_s"] / share,
        "ingress_ms_per_request": 1e3 * share / figures["requests_per_s"],
    }


async def call(api: Any, request: Request) -> int:
    """One request to an ASGI application, without a server between. The status."""
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": request.path,
        "raw_path": request.path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [
            (b"content-type", request.content_type.encode()),
            (b"content-length", str(len(request.body)).encode()),
        ],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }
    status = 0

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": request.body, "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        nonlocal status
        status = message.get("status", status)

    await api(scope, receive, send)
    return status


def with_shares(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each row with its share of linear: of the first row's tokens/s for each replica."""
    first = rows[0]["tokens_per_s"] / rows[0]["num_replicas"]
    return [
        {**row, "share_of_linear": row["tokens_per_s"] / row["num_replicas"] / first}
        for row in rows
    ]


def tables(result: dict[str, Any]) -> str:
    """Markdown: scaling, then what one core of ingress carries."""
    head = ["replicas", "tokens/s", "of linear", "p50 ms", "p99 ms", "ingress core", "not 200"]
    scaling = [head]
    for row in result["scaling"]:
        failed = sum(n for status, n in row["statuses"].items() if status != "200")
        core = f"{row['ingress_cpu_share']:.2f}"
        core += " (saturated)" if row["ingress_cpu_share"] > _SATURATED else ""
        numbers = [f"{row['tokens_per_s']:,.0f}", f"{row['share_of_linear']:.3f}"]
        numbers += [f"{row['p50_ms']:,.0f}", f"{row['p99_ms']:,.0f}", core, str(failed)]
        scaling.append([str(row["num_replicas"]), *numbers])
    carried = [["body", "tokens/s of one core", "us/token", "ms/request", "tokens/request"]]
    for kind, row in result["ingress"].items():
        rate = row["ingress_tokens_per_s"]
        tokens = row["tokens_per_s"] / row["requests_per_s"]
        numbers = [f"{rate:,.0f}", f"{1e6 / rate:.2f}", f"{row['ingress_ms_per_request']:.2f}"]
        carried.append([kind, *numbers, f"{tokens:,.0f}"])
    free = [r for r in result["scaling"] if r["ingress_cpu_share"] <= _SATURATED]
    least = min((r["share_of_linear"] for r in free), default=1.0)
    most = max((r["num_replicas"] for r in free), default=0)
    verdict = (
        f"until the ingress saturates (up to {most} replicas): at least {least:.3f} of linear; "
        f"goal {_GOAL}: {'met' if least >= _GOAL else 'not met'}"
    )
    rate = f"{result['replica_tokens_per_s']:,.0f} tokens/s a replica, {result['body']}"
    return f"{rate}\n\n{markdown(scaling)}\n\n{verdict}\n\n{markdown(carried)}"


if __name__ == "__main__":
    sys.exit(main())
