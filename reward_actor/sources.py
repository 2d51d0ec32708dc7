"""Where rows come from: files, directories and globs of files, and the Hugging Face hub.

A data set is a list of splits. Each is read by itself, so that several processes can share one.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from glob import glob, has_magic
from itertools import pairwise
from pathlib import Path
from typing import Any

from reward_actor.json_files import IS_AN_ARRAY, begins_an_array

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
SPLIT_BYTES = 16 << 20
_HUB_ROWS = 10_000
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.\[\]%:+-]+)?")


@dataclass(frozen=True)
class Split:
    """Some of the rows of a file or of a hub data set.

    `begin` and `end` are bytes of a .jsonl file (a line belongs to where it begins), row groups of
    a .parquet file, rows of a hub data set, and nothing for a .jsonl.gz file, which is one split.
    """

    path: str
    begin: int
    end: int


def is_file_name(source: str) -> bool:
    """Whether `source` means files; otherwise it is a name on the hub."""
    return source.endswith(SUFFIXES) or Path(source).exists() or not _HUB_NAME.fullmatch(source)


def check_source(source: str, field: str) -> None:
    """Raise ValueError, without reading it, for files that are missing or of an unknown type."""
    if not is_file_name(source):
        return
    path = Path(source).expanduser()
    if not path.exists() and has_magic(source):
        if not files_of(source):
            raise ValueError(f"{field}: no file matches {path.absolute()}")
        return
    if path.is_dir():
        if not files_of(source):
            known = ", ".join(SUFFIXES)
            raise ValueError(f"{field}: {path.absolute()} is a directory without {known} files")
        return
    if not path.is_file():
        raise ValueError(f"{field}: {path.absolute()} does not exist")
    if not path.name.endswith(SUFFIXES):
        raise ValueError(f"{field}: {path} must end in {', '.join(SUFFIXES)}")


def files_of(source: str) -> list[Path]:
    """The files that a file name, a directory or a glob means, sorted."""
    path = Path(source).expanduser()
    if path.is_file():
        return [path]
    found = path.iterdir() if path.is_dir() else map(Path, glob(str(path), recursive=True))
    return sorted(file for file in found if file.name.endswith(SUFFIXES) and file.is_file())


def fingerprint(source: str) -> list[list[Any]]:
    """Differs when the data set does: names, sizes and times of files, or the hub's own mark."""
    if not is_file_name(source):
        return [[source, content_mark(_hub(source))]]
    stats = [(file, file.stat()) for file in files_of(source)]
    return [[str(file.absolute()), stat.st_size, stat.st_mtime_ns] for file, stat in stats]


def content_mark(data: Any) -> str:
    """Differs when a `datasets.Dataset` does. Private as of datasets 5.2: its cache goes by it, and
    nothing public tells two contents apart without reading them."""
    return str(data._fingerprint)  # noqa: SLF001


def splits(source: str, split_bytes: int = SPLIT_BYTES) -> list[Split]:
    """All of a data set, in its order. Raises ValueError for one that cannot be read."""
    if not is_file_name(source):
        ends = [*range(0, len(_hub(source)), _HUB_ROWS), len(_hub(source))]
        return [Split(source, *span) for span in pairwise(ends)]
    check_source(source, "data")
    return [split for file in files_of(source) for split in _file_splits(file, split_bytes)]


def read_split(split: Split) -> Iterator[Any]:
    """Its rows in order: lines of JSON, blank ones too, or rows that are parsed already.

    A line that is not UTF-8 comes as its bytes: what counts the lines can name it. Raises
    ValueError for a file that is damaged.
    """
    path = Path(split.path)
    if not is_file_name(split.path):
        yield from _hub(split.path).select(range(split.begin, split.end))
    elif path.suffix == ".parquet":
        yield from _parquet_rows(path, split)
    else:
        yield from _lines(path, split)


def raw_rows(source: str) -> Iterator[tuple[int, Any]]:
    """Every row that is not blank, with its line (from 1) in the data set."""
    number = 0
    for split in splits(source):
        for raw in read_split(split):
            number += 1
            if not is_blank(raw):
                yield number, raw


def is_blank(raw: Any) -> bool:
    return isinstance(raw, str) and not raw.strip()


def _file_splits(file: Path, split_bytes: int) -> list[Split]:
    if file.suffix == ".gz":
        return [Split(str(file), 0, 0)]
    if file.suffix != ".parquet":
        size = file.stat().st_size
        return [Split(str(file), *span) for span in pairwise([*range(0, size, split_bytes), size])]
    from pyarrow import ArrowInvalid, parquet

    try:
        metadata = parquet.read_metadata(file)
    except (OSError, ArrowInvalid) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    starts, size = [0], 0
    for group in range(metadata.num_row_groups):
        if size >= split_bytes:
            starts.append(group)
            size = 0
        size += metadata.row_group(group).total_byte_size
    return [Split(str(file), *span) for span in pairwise([*starts, metadata.num_row_groups])]


def _lines(path: Path, split: Split) -> Iterator[str | bytes]:
    is_packed = path.suffix == ".gz"
    num_read = 0
    opener: Callable[..., Any] = gzip.open if is_packed else open
    try:
        with opener(path, "rb") as file:
            if split.begin:
                file.seek(split.begin - 1)
                file.readline()  # belongs to the split before
            while is_packed or file.tell() < split.end:
                line = file.readline()
                if not line:
                    return
                num_read += 1
                if not split.begin and num_read == 1 and begins_an_array(line):
                    raise ValueError(f"{path} {IS_AN_ARRAY}")
                try:
                    text = line.decode("utf-8-sig")  # a mark that some tools write first
                except UnicodeDecodeError:
                    yield line
                else:
                    yield text
    except (OSError, EOFError, zlib.error) as error:
        # Only such a file is always read from its first line.
        where = f" from line {num_read + 1} on" if is_packed else ""
        raise ValueError(f"{path} cannot be read{where}: {error}") from error


def _parquet_rows(path: Path, split: Split) -> Iterator[dict[str, Any]]:
    from pyarrow import ArrowInvalid, parquet

    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(row_groups=list(range(split.begin, split.end))):
                yield from batch.to_pylist()
    except (OSError, ArrowInvalid) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


@lru_cache(maxsize=4)
def _hub(name: str) -> Any:
    import datasets

    path, _, split = name.partition(":")
    try:
        return datasets.load_dataset(path, split=split or "train")
    except (OSError, ValueError) as error:  # hub errors (unknown, offline) are OSErrors
        raise ValueError(f"{name} cannot be loaded from the Hugging Face hub: {error}") from error
