"""How the tests run the training benchmark: a few short pairs on a tiny network."""

from __future__ import annotations

FLAGS = (
    "--shape tiny --device cpu --dtype float32 --threads 1 --pairs 10 --rounds 2 "
    "--prompt-tokens 12 --chosen-tokens 2..9 --rejected-tokens 2..9 --micro-batch-tokens 100"
)
