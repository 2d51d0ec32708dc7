"""Small files as those of RewardBench 1 and 2."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

V1 = [
    {"prompt": "Name two fruits.", "chosen": "Apples.", "rejected": "No.", "subset": "hep-go"},
    {"prompt": "And a tool?", "chosen": "A knife.", "rejected": "None.", "subset": "math-prm"},
    {"prompt": "An egg?", "chosen": "Yes.", "rejected": "No. " * 300, "subset": "alpacaeval-easy"},
]
V2 = [
    {
        "id": "7",
        "prompt": "Name two fruits.",
        "chosen": ["Apples and pears."],
        "rejected": ["No.", "Knives.", "Maybe."],
        "num_correct": 1,
        "num_incorrect": 3,
        "total_completions": 4,
        "subset": "Focus",
        "models": ["a", "b", "c", "d"],
    },
    {
        "id": "ref:3",
        "prompt": "What is 1 + 1?",
        "chosen": ["2"],
        "rejected": ["3", "4"],
        "num_correct": 1,
        "subset": "Ties",
    },
    {
        "id": "tied:3",
        "prompt": "Name a tool.",
        "chosen": ["A knife.", "A spoon.", "A pan."],
        "rejected": ["A pear.", "A tree."],
        "num_correct": 3,
        "subset": "Ties",
    },
]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return str(path)
