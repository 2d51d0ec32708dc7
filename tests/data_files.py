"""What the tests of a training's data share: files of rows, and what is prepared of them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from trainer.config import TrainConfig
from trainer.config_file import load_config
from trainer.prepare import Prepared
from trainer.run import prepare, resolve_paths


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def with_damage(packed: bytes) -> bytes:
    """A gzip file to which a member is added whose deflate stream is of no known type."""
    return packed + gzip.compress(b"")[:10] + b"\xff" * 99


def questions(name: str, num: int) -> list[dict[str, Any]]:
    return [
        {"prompt": f"{name} {i}?", "chosen": f"Yes, {i}.", "rejected": f"No, not {i}."}
        for i in range(num)
    ]


def config_of(base_model: Path, output_dir: Path, train: Any, **changes: Any) -> TrainConfig:
    values = {
        "model.path": base_model,
        "model.dtype": "float32",
        "data.train": json.dumps(train) if isinstance(train, dict) else train,
        "data.eval_fraction": 0.2,
        "output_dir": output_dir,
        **{key.replace("__", "."): value for key, value in changes.items()},
    }
    overrides = [(key, str(value)) for key, value in values.items()]
    return resolve_paths(load_config(None, overrides))


def prepared(*args: Any, **changes: Any) -> Prepared:
    return prepare(config_of(*args, **changes))[0]
