"""Devices by name: what is there, and what is said of what is not."""

from __future__ import annotations

import pytest
import torch

from reward_actor.devices import resolve_device


@pytest.mark.parametrize(
    ("device", "num_gpus", "result"),
    [
        ("auto", 0, "cpu"),
        ("auto", 1, "cuda"),
        ("cpu", 0, "cpu"),
        ("cuda", 1, "cuda"),
        ("cuda:1", 2, "cuda:1"),
        ("cuda", 0, r"^device cuda: torch \S+ sees no GPU here; `rayward doctor`"),
        ("cuda:1", 1, r"^device cuda:1: torch \S+ sees 1 of them here$"),
        ("gpu", 1, "^device is 'gpu'; it must be auto, cpu, cuda, cuda:1"),
    ],
)
def test_a_device_is_resolved_or_said_to_be_missing(
    device: str, num_gpus: int, result: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: num_gpus > 0)
    if result.startswith("^"):
        with pytest.raises(ValueError, match=result):
            resolve_device(device)
    else:
        assert resolve_device(device) == result
