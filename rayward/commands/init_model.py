"""`rayward init-model DIR`."""

from __future__ import annotations

import argparse
from pathlib import Path

NAME = "init-model"
HELP = "make a small base model: tokenizer and network"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", metavar="DIR")
    parser.add_argument("--corpus", help="text to train the tokenizer on: .jsonl, .jsonl.gz, .txt")
    parser.add_argument(
        "--tokenizer-from", metavar="DIR", help="use this model's tokenizer instead"
    )
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--num-layers", type=int, default=2)
    parser.add_argument("--max-length", type=int, default=2048, help="positions of the network")
    parser.add_argument("--seed", type=int, default=0)


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
    print(f"base model: {path}")
    return 0
