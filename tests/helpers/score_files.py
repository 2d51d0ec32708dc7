"""What `rayward score` reads in the tests: rows of every form, in a file, packed or not."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

ROWS = [
    {"prompt": "Name two fruits.", "completions": ["An apple.", "A pear."], "id": 7},
    {"prompt": [{"role": "user", "content": "Hi."}], "completion": "Hello."},
    {"prompt_ids": [5, 6], "completion_ids": [[7], [8, 9], [7] * 999]},
]


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path
