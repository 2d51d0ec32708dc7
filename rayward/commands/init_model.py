"""`rayward init-model DIR`."""

from __future__ import annotations

import argparse
from pathlib import Path

from reward_actor.terminal import put

NAME = "init-model"
HELP = "make a small base model: tokenizer and network"
EXTRA = "train"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", metavar="DIR", help="directory to write")
    parser.add_argument(
        "--corpus",
        metavar="FILE",
        help="text to train the tokenizer on: .jsonl, .jsonl.gz, .txt [none]",
    )
    parser.add_argument(
        "--tokenizer-from", metavar="DIR", help="use this model's tokenizer instead [none]"
    )
    for name, default, help in (
        ("--vocab-size", 2048, "tokens in the vocabulary"),
        ("--hidden-size", 128, "width of the network"),
        ("--num-layers", 2, "layers of the network"),
        ("--max-length", 2048, "tokens in a sequence at most: positions of the network"),
        ("--seed", 0, "of the first weights"),
    ):
        parser.add_argument(
            name, type=int, metavar="INT", default=default, help=f"{help} [{default}]"
        )


def run(arguments: argparse.Namespace) -> int:
    from trainer.init_model import init_model, texts_from_file

    source = arguments.tokenizer_from
    if not (arguments.corpus or source):
        raise ValueError("init-model needs --corpus FILE or --tokenizer-from DIR")
    path = init_model(
        Path(arguments.directory),
        texts_from_file(arguments.corpus) if arguments.corpus else (),
        vocab_size=arguments.vocab_size,
        hidden_size=arguments.hidden_size,
        num_layers=arguments.num_layers,
        max_position_embeddings=arguments.max_length,
        tokenizer_from=Path(source) if source else None,
        seed=arguments.seed,
    )
    put(f"base model: {path}")
    return 0
