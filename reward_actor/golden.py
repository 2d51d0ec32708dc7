"""The golden samples: fixed texts whose raw scores are recorded at export and replayed at load."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from reward_actor.contract import (
    FLOAT32_TOLERANCE,
    ContractError,
    Golden,
    GoldenSample,
    ScoringContract,
    check_scores,
)
from reward_actor.readout import Readout
from reward_actor.render import Renderer

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from reward_actor.scorer import RewardScorer

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

# A right bfloat16 implementation lies about as far from the float32 score as the one that was
# measured; two of them lie at most twice that apart, and six samples do not show the worst case.
_SAFETY = 4.0
_BFLOAT16_FLOOR = 1e-3


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
                "is not the one that the model was trained with"
            )
    scores = raw_scores([sample.input_ids for sample in samples])
    combined = Readout.of(contract).read(scores).raw_scores
    check_scores(contract, dtype, combined.tolist(), path)


def _load(directory: Path, device: str, dtype: str) -> RewardScorer:
    """The exported weights on the device, or on the CPU if the device has no room for them.

    Without a cache: a sample alone and the same one in a batch are compared.
    """
    import torch

    from reward_actor.scorer import RewardScorer

    def on(place: str) -> RewardScorer:
        return RewardScorer.from_pretrained(
            directory, place, dtype, check_golden=False, cache_size=0
        )

    try:
        return on(device)
    except torch.cuda.OutOfMemoryError:
        return on("cpu")


def record(directory: Path, contract: ScoringContract, device: str = "auto") -> ScoringContract:
    """Score the golden samples with the weights in `directory` and save the completed contract.

    Of several heads the expected raw score is the one that the contract's rule makes of them.
    float32 is held to 1e-5, unless alone and in a batch already differ by more here: then to four
    times that, with a warning. bfloat16 is held to four times the largest difference between its
    scores (alone and in a batch) and the float32 ones. Raises ValueError for scores that are not
    finite.
    """
    contract.save(directory)
    raw_scores: dict[str, np.ndarray] = {}
    tolerance = {}
    samples: list[GoldenSample] = []
    for dtype in ("float32", "bfloat16"):
        scorer = _load(directory, device, dtype)
        samples = golden_samples(scorer.renderer)
        rows = [sample.input_ids for sample in samples]
        read = scorer.readout.read
        alone = read(np.concatenate([scorer.raw_scores([row]) for row in rows]))
        raw_scores[dtype] = alone.raw_scores
        apart = 0.0
        scale = np.maximum(1.0, np.abs(raw_scores["float32"]))
        for reading in (alone, read(scorer.raw_scores(rows))):
            scores = reading.raw_scores
            if not reading.finite.all():
                raise ValueError(
                    f"the golden samples score {scores.tolist()} in {dtype}: the weights are not "
                    "finite, so the export is not saved"
                )
            apart = max(apart, float(np.max(np.abs(scores - raw_scores["float32"]) / scale)))
        floor = FLOAT32_TOLERANCE if dtype == "float32" else _BFLOAT16_FLOOR
        exact = dtype == "float32" and apart <= floor
        tolerance[dtype] = floor if exact else max(floor, _SAFETY * apart)
        if dtype == "float32" and not exact:
            warnings.warn(
                f"float32 scores change by {apart:.2g} between a sample alone and in a batch; the "
                f"contract allows {tolerance[dtype]:.2g}",
                stacklevel=2,
            )
    golden = Golden(
        samples=samples,
        raw_scores={dtype: scores.tolist() for dtype, scores in raw_scores.items()},
        tolerance=tolerance,
    )
    complete = replace(contract, golden=golden)
    complete.save(directory)
    return complete
