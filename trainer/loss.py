"""The Bradley-Terry loss and what it is watched by. Shapes: P pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn import functional as F

if TYPE_CHECKING:
    from torch import Tensor


def bradley_terry(chosen: Tensor, rejected: Tensor, margin: Tensor | None = None) -> Tensor:
    """(P,) rewards of both sides and optional (P,) margins -> (P,) float32 losses, not reduced.

    -log sigmoid(r_chosen - r_rejected - margin): the negative log-likelihood of the preference
    under Bradley and Terry (1952), as in InstructGPT (arXiv:2203.02155, eq. 1, K = 2) and with the
    margin of Llama 2 (arXiv:2307.09288, eq. 2).
    """
    difference = chosen.float() - rejected.float()
    if margin is not None:
        difference = difference - margin.float()
    return -F.logsigmoid(difference)


def correct(chosen: Tensor, rejected: Tensor) -> Tensor:
    """(P,) rewards of both sides -> (P,) float32: 1 where chosen wins, 1/2 for a tie, else 0.

    A tie is a coin toss; counting it as wrong would reward a model for noise.
    """
    return (chosen > rejected).float() + 0.5 * (chosen == rejected).float()
