"""`rayward ensemble DIR MEMBER ...`."""

from __future__ import annotations

import argparse

from reward_actor.terminal import put

NAME = "ensemble"
HELP = "make several reward models one, for score and serve"
EXTRA = "serve"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", metavar="DIR", help="directory to write ensemble.json into")
    parser.add_argument("members", metavar="MEMBER", nargs="+", help="directories of reward models")
    parser.add_argument(
        "--combine",
        choices=("mean", "min", "mean_minus_std"),
        metavar="mean|min|mean_minus_std",
        default="mean",
        help="how their rewards become one [%(default)s]",
    )
    parser.add_argument(
        "--k", type=float, metavar="FLOAT", default=1.0, help="of mean_minus_std [1]"
    )


def run(arguments: argparse.Namespace) -> int:
    from reward_actor.model.ensemble import write_ensemble

    readout = write_ensemble(arguments.directory, arguments.members, arguments.combine, arguments.k)
    put(f"ensemble: {arguments.directory}")
    k = f", k {readout.k:g}" if readout.combine == "mean_minus_std" else ""
    put(f"{readout.combine} of {len(readout)} members{k}: {', '.join(readout.names)}")
    return 0
