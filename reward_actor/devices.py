"""Which device a name means, checked before anything is read for it."""

from __future__ import annotations

import torch


def resolve_device(device: str, name: str = "device") -> str:
    """The device, where "auto" is CUDA if there is one. Raises ValueError for one that is not
    there; `name` is what chose it, for the message."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        wanted = torch.device(device)
    except RuntimeError:
        raise ValueError(f"{name} is {device!r}; it must be auto, cpu, cuda, cuda:1, ...") from None
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        seen = torch.cuda.device_count()
        raise ValueError(
            f"{name} {device}: torch {torch.__version__} sees "
            + (f"{seen} of them here" if seen else "no GPU here; `rayward doctor` may say why")
        )
    return device
