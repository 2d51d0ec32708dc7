"""What a training can fail with that is nobody's wrong input."""

from __future__ import annotations


class TrainingError(RuntimeError):
    """The training cannot go on; the message says where it stands and why."""
