"""The error that ends a training, and how it speaks meanwhile."""

from __future__ import annotations

from reward_actor.terminal import phase, say, warn

__all__ = ["TrainingError", "phase", "say", "warn"]


class TrainingError(RuntimeError):
    """The training cannot go on; the message says where it stands and why."""
