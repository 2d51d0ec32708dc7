"""The error that ends a training."""

from __future__ import annotations


class TrainingError(RuntimeError):
    """The training cannot go on; the message says at which step, and why."""
