"""Types of command-line arguments: their errors say what is wrong with a value."""

from __future__ import annotations

import math


def positive(text: str) -> int:
    """A whole number of at least 1. Raises ValueError."""
    number = int(text)
    if number < 1:
        raise ValueError(f"{text} is below 1")
    return number


def seconds(text: str) -> float:
    """A finite number of at least 0. Raises ValueError."""
    number = float(text)
    if not 0 <= number < math.inf:
        raise ValueError(f"{text} is no duration")
    return number


def positive_float(text: str) -> float:
    """Raises ValueError."""
    number = seconds(text)
    if not number:
        raise ValueError(f"{text} is not above 0")
    return number
