"""Files and directories that are written whole or not at all, and what a full disk says then."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: Path, mode: int = 0o666) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` once it is whole and on the disk; no reader and no
    crash sees half of it. `mode`: its permissions, less the umask.

    Raises OSError that names `path` where the disk has no room.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")

    def create(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_EXCL | os.O_NOFOLLOW, mode)

    try:
        with room_for(path), open(partial, "wb", opener=create) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        if error.filename == str(partial):  # a name that no user knows
            error.filename = str(path)
        raise
    finally:
        partial.unlink(missing_ok=True)


def replace_text(path: Path, text: str, mode: int = 0o666) -> None:
    """Write a file that is never seen half-written."""
    with replacing(path, mode) as file:
        file.write(text.encode())


@contextmanager
def replacing_directory(directory: Path, num_bytes: int) -> Iterator[Path]:
    """A directory that takes the place of `directory` once it is whole. An error or an interrupt
    leaves what was there before, and nothing else.

    `num_bytes` is about what it will hold. Raises OSError that names `directory` where the disk has
    no room.
    """
    staging = directory.with_name(directory.name + ".partial")
    previous = directory.with_name(directory.name + ".previous")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        with room_for(directory, num_bytes):
            staging.mkdir(parents=True)
            yield staging
        shutil.rmtree(previous, ignore_errors=True)
        if directory.exists():
            directory.replace(previous)
        staging.replace(directory)
        shutil.rmtree(previous, ignore_errors=True)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def room_for(path: Path, num_bytes: int | None = None) -> Iterator[None]:
    """Every library has its own exception for a full disk; here it is one, and names the place."""
    try:
        yield
    except Exception as error:
        if not _is_full(error):
            raise
        free = shutil.disk_usage(next(p for p in path.absolute().parents if p.exists())).free
        needs = "" if num_bytes is None else f", which needs about {_shown(num_bytes)}"
        raise OSError(
            errno.ENOSPC, f"no room for {path}{needs}: its disk has {_shown(free)} left"
        ) from error


def _is_full(error: Exception) -> bool:
    number = getattr(error, "errno", None)
    return number in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error)


def _shown(num_bytes: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes / 1e3:.0f} kB"
