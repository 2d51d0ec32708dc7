"""What the tests of a training's data share: files of rows, and what is prepared of them."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reward_actor.render import Renderer
from trainer.config.config_file import load_config
from trainer.config.data import Source
from trainer.config.train import TrainConfig
from trainer.data.load import gather_rows
from trainer.data.prepare import prepare
from trainer.data.render import Rules
from trainer.run import resolve_paths

if TYPE_CHECKING:
    from trainer.data.gather import Gathered
    from trainer.data.rows import Row
    from trainer.data.split import Prepared

COLUMNS = Source.model_validate({})
USER, GOOD, BAD = (
    {"role": "user", "content": "Name a fruit."},
    {"role": "assistant", "content": "An apple."},
    {"role": "assistant", "content": "A pan."},
)
PAIR = {"prompt": "Name a fruit.", "chosen": "An apple.", "rejected": "A pan."}
DIALOGUE = "\n\nHuman: Name a fruit.\n\nAssistant: "


def write(path: Path, rows: Sequence[Any]) -> str:
    """Rows as lines of JSON; a text is a line as it is."""
    path.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in rows))
    return str(path)


def rendered(rows: list[Row], renderer: Renderer, split_seed: int = 0, **rules: Any) -> Gathered:
    return gather_rows({"a": rows}, renderer, Rules(split_seed=split_seed, **rules))


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
