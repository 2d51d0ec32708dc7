"""The golden samples: fixed texts whose raw scores are recorded at export and replayed at load."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from reward_actor.contract import (
    ContractError,
    GoldenSample,
    check_scores,
)
from reward_actor.readout import Readout
from reward_actor.render import Renderer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


# Written for this purpose, so that no export carries a line of anybody's data. Lengths differ, so
# that a batch of them is padded; the last ones hold what tokenizers and templates stumble over.
_TEXTS = (
    ("Name two fruits.", "An apple and a pear."),
    ("Name two fruits.", "No."),
    ("How do I boil an egg?", "Put it into boiling water for seven minutes, then cool it."),
    ("Write one line of Python that prints the numbers 1 to 3.", "print(*range(1, 4))\n"),
    ("Übersetze „Guten Morgen“ ins Japanische.", "おはようございます ☀️"),
    ("Repeat after me:", "  spaces   and\n\nblank lines\t "),
)


def golden_samples(renderer: Renderer) -> list[GoldenSample]:
    """The fixed texts with their ids under this contract; those too long for it are left out."""
    samples = [GoldenSample(p, c, renderer.render(p, c)) for p, c in _TEXTS]
    fitting = [s for s in samples if len(s.input_ids) <= renderer.contract.max_length]
    if not fitting:
        raise ValueError(
            f"max_length is {renderer.contract.max_length}: too short for every golden sample; "
            "use at least 64"
        )
    return fitting


def replay(
    renderer: Renderer,
    dtype: str,
    raw_scores: Callable[[list[list[int]]], NDArray[np.float32]],
    path: str,
) -> None:
    """Score the contract's golden samples, if it has any, by what scores for this very model.

    raw_scores: n sequences -> (n, K); `path` names it, for the message. Raises ContractError at the
    first mismatch.
    """
    contract = renderer.contract
    samples = contract.golden.samples
    if not samples:
        return
    for index, sample in enumerate(samples):
        ids = renderer.render(sample.prompt, sample.completion)
        if ids != sample.input_ids:
            raise ContractError(
                f"golden sample {index} renders to other token ids than at export "
                f"({len(ids)} against {len(sample.input_ids)}): the tokenizer or the chat template "
                "is not the one that the model was trained with; rayward score DIR INPUT --explain "
                "ROW shows what becomes of a row"
            )
    scores = raw_scores([sample.input_ids for sample in samples])
    combined = Readout.of(contract).read(scores).raw_scores
    check_scores(contract, dtype, combined.tolist(), path)
