"""Rollouts on disk as they come, and what an interrupted run resumes from.

They are first JSON lines in `OUTPUT.unfinished`: a header that says what run it belongs to, then a
line for each prompt that is done. A line is whole or the last one. When all are done they become
the output, in the order of the prompts, and the file is removed.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from reward_actor.atomic import replacing, room_for
from reward_actor.files import Row, line_of, write_rows
from reward_actor.rollout.rows import INDEX

if TYPE_CHECKING:
    import pyarrow

_HEADER = b'{"run": '
_ROWS_IN_A_GROUP = 1000


class RolloutFile:
    """Use it as a context manager."""

    def __init__(self, output: str | Path, run: Mapping[str, Any], *, overwrite: bool) -> None:
        """run: what must be equal for rollouts to be of the same run, as JSON has it.

        Raises ValueError for an output that exists, and for an unfinished one of another run,
        unless they may be overwritten, and for an output that cannot be written.
        """
        self.output = Path(output)
        self.unfinished = self.output.with_name(self.output.name + ".unfinished")
        self._run = json.loads(json.dumps(run))
        self._places: dict[int, int] = {}  # index of the prompt -> where its line begins
        if self.output.exists() and not overwrite:
            raise ValueError(f"{self.output} exists; --overwrite replaces it")
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.unfinished.open("ab", buffering=0)
        self._lock()
        end = self._read(overwrite)
        self._file.truncate(end)
        if not end:
            self._write({"run": self._run})

    @property
    def done(self) -> frozenset[int]:
        """The prompts that are done."""
        return frozenset(self._places)

    def add(self, row: Row) -> None:
        """Raises OSError; what was written before is whole."""
        self._places[row[INDEX]] = self._write(row)

    def rows(self) -> Iterator[Row]:
        """Those that are done, in the order of the prompts."""
        with self.unfinished.open("rb") as file:
            for index in sorted(self._places):
                file.seek(self._places[index])
                yield json.loads(file.readline())

    def finish(self, make: Callable[[Row], list[Row]]) -> int:
        """Write the output, in which each row becomes some, and how many there are.

        Raises ValueError for rows that Parquet cannot hold, and OSError; nothing is lost then.
        """
        num_rows = 0

        def made() -> Iterator[Row]:
            nonlocal num_rows
            num_rows = 0
            for row in self.rows():
                some = make(row)
                num_rows += len(some)
                yield from some

        if self.output.suffix == ".parquet":
            self._write_parquet(made)
        else:
            write_rows(self.output, made())
        self.unfinished.unlink()  # while it is locked
        self._file.close()
        return num_rows

    def _write_parquet(self, made: Callable[[], Iterator[Row]]) -> None:
        from pyarrow import parquet

        try:
            schema = parquet_schema(made())
        except ValueError as error:
            jsonl = self.output.with_suffix(".jsonl")
            raise ValueError(
                f"{error}; rename {self.unfinished} to {jsonl}.unfinished and run the same command "
                f"with {jsonl}"
            ) from error
        with replacing(self.output) as file, parquet.ParquetWriter(file, schema) as writer:
            for table in _tables(made(), schema):
                writer.write_table(table)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._places:  # nothing to resume from
            self.unfinished.unlink(missing_ok=True)
        self._file.close()

    def _read(self, overwrite: bool) -> int:
        """Read what an earlier run has left; where its last whole line ends, 0 for nothing."""
        end = 0
        with self.unfinished.open("rb") as file:
            for number, line in enumerate(file):
                if not line.endswith(b"\n") and (number or line.startswith(_HEADER[: len(line)])):
                    break  # it was killed while it wrote this
                try:
                    value = json.loads(line)
                    if number == 0:
                        before = value["run"]
                    else:
                        self._places[value[INDEX]] = end
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(
                        f"{self.unfinished}:{number + 1}: not rollouts; remove the file"
                    ) from error
                end += len(line)
        if end and before != self._run:
            if not overwrite:
                raise ValueError(self._other(before))
            self._places.clear()
            end = 0
        return end

    def _other(self, before: Mapping[str, Any]) -> str:
        changed = sorted(n for n in {*before, *self._run} if before.get(n) != self._run.get(n))
        return (
            f"{self.unfinished} has {len(self._places)} prompts of another run, which differs in "
            f"{', '.join(changed)}; repeat that one to resume it, or --overwrite to discard it"
        )

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process writes {self.unfinished}") from None

    def _write(self, row: Mapping[str, Any]) -> int:
        """Append a line, whole or not at all; where it begins."""
        begin = self._file.seek(0, os.SEEK_END)
        left = memoryview(line_of(row))
        try:
            with room_for(self.unfinished):
                while left:
                    left = left[self._file.write(left) :]
        except OSError:
            self._file.truncate(begin)
            raise
        return begin


def parquet_schema(rows: Iterable[Row]) -> pyarrow.Schema:
    """Of all their columns; a row may be without some. Raises ValueError for rows that no schema is
    of."""
    import pyarrow

    schema = pyarrow.schema([])
    try:
        for table in _tables(rows):
            schema = pyarrow.unify_schemas([schema, table.schema], promote_options="permissive")
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError) as error:
        raise ValueError(f"Parquet cannot hold these rows ({error})") from error
    return schema


def _tables(rows: Iterable[Row], schema: pyarrow.Schema | None = None) -> Iterator[pyarrow.Table]:
    """Of some rows each. schema: of them all."""
    import pyarrow

    rows = iter(rows)
    while some := list(islice(rows, _ROWS_IN_A_GROUP)):
        names = dict.fromkeys(name for row in some for name in row)
        yield pyarrow.Table.from_pylist(
            [{name: row.get(name) for name in names} for row in some], schema
        )
