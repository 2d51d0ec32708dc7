"""`rayward convert SRC DST`."""

from __future__ import annotations

import argparse

from reward_actor.command_line import Flag
from reward_actor.terminal import put

NAME = "convert"
HELP = "turn another system's reward model into ours"
EXTRA = "serve"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="directory of the reward model or adapter")
    parser.add_argument("destination", metavar="DST", help="directory to write; must not exist")
    parser.add_argument(
        "--tokenizer-from", metavar="DIR", help="use this directory's tokenizer [SRC's]"
    )
    parser.add_argument(
        "--format",
        choices=("chat", "text"),
        metavar="chat|text",
        help="how sequences are rendered [chat where there is a template]",
    )
    parser.add_argument(
        "--ends-with",
        metavar="TEXT",
        help="what a sequence ends with after its completion, in place of newlines where there is "
        "no template; or none [as its system does]",
    )
    parser.add_argument(
        "--append-eos",
        action=Flag,
        help="whether EOS comes behind that [as its system does]",
    )
    parser.add_argument(
        "--head-rows",
        metavar="A[-B]",
        help="score by the logit of a token of a language model's own head, or by the difference "
        "of two; a token or its id [SRC's own head]",
    )
    parser.add_argument(
        "--heads",
        metavar="NAME=WEIGHT,...",
        help="its head's outputs in order; the reward is their weighted sum (no weights: mean) "
        "[as SRC says]",
    )
    parser.add_argument(
        "--template-args",
        metavar="JSON",
        help="arguments of the chat template where a row or request does not give its own [{}]",
    )
    parser.add_argument(
        "--dtype", metavar="DTYPE", default="auto", help="of the weights [what SRC holds]"
    )
    parser.add_argument(
        "--device",
        metavar="DEVICE",
        default="cpu",
        help="where the golden samples are scored: auto, cpu, cuda, cuda:1, ... [%(default)s]",
    )
    parser.add_argument(
        "--trust-remote-code",
        action=Flag,
        default=False,
        help="run the Python code that SRC comes with [off]",
    )


def run(arguments: argparse.Namespace) -> int:
    from reward_actor.conversation import template_args
    from reward_actor.convert import convert

    given = arguments.template_args
    contract = convert(
        arguments.source,
        arguments.destination,
        tokenizer_from=arguments.tokenizer_from,
        format=arguments.format,
        dtype=arguments.dtype,
        device=arguments.device,
        trust_remote_code=arguments.trust_remote_code,
        ends_with=arguments.ends_with,
        append_eos=arguments.append_eos,
        head_rows=arguments.head_rows,
        heads=arguments.heads,
        template_args=None if given is None else template_args(given, "--template-args"),
        tell=lambda line: put(f"inferred {line}"),
    )
    put(f"reward model: {arguments.destination}")
    put(f"format {contract.format}, {contract.dtype}, at most {contract.max_length} tokens")
    if (contract.mean, contract.std) != (0.0, 1.0):
        put(f"reward = (raw score - {contract.mean:g}) / {contract.std:g}")
    return 0
