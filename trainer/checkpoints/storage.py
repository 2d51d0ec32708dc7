"""Files on any filesystem that pyarrow knows: a local path, NFS, s3://, gs://, hdfs://.

A name is a path below the storage's root, with "/" between its parts.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import pyarrow as pa
from pyarrow import fs

if TYPE_CHECKING:
    from trainer.config.train import TrainConfig

# Below output_dir, where no other place is wanted.
CHECKPOINT_DIR = "checkpoints"

# What a filesystem that is full, gone or does not let us in raises.
StorageError = (OSError, pa.ArrowException)

_CHUNK_BYTES = 4 * 2**20


@dataclass(frozen=True)
class Storage:
    """A folder of a filesystem. Methods raise OSError or pyarrow's ArrowException."""

    filesystem: fs.FileSystem
    root: str

    @classmethod
    def at(cls, location: str, *below: str) -> Storage:
        """The folder `below` an absolute path or a URI. Raises ValueError for what is neither."""
        try:
            filesystem, path = fs.FileSystem.from_uri(location)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{location!r} is no absolute path and no URI: {error}") from error
        return cls(filesystem, "/".join([path.rstrip("/"), *below]))

    @property
    def is_local(self) -> bool:
        """Whether its files can be opened where they are."""
        return isinstance(self.filesystem, fs.LocalFileSystem)

    def path(self, name: str) -> str:
        """What the filesystem calls a file or folder."""
        return f"{self.root}/{name}"

    def make(self) -> None:
        """Create the folder if it is not there."""
        self.filesystem.create_dir(self.root, recursive=True)

    def sizes(self, folder: str = "") -> dict[str, int]:
        """The names of all files in a folder of it, or in it, and their bytes, by one listing; the
        names are those below that folder. None if it is not there."""
        place = self.path(folder).rstrip("/")
        found = self.filesystem.get_file_info(
            fs.FileSelector(place, allow_not_found=True, recursive=True)
        )
        return {
            info.path[len(place) + 1 :]: info.size
            for info in found
            if info.type == fs.FileType.File
        }

    def folders(self) -> list[str]:
        """The names of the folders directly below, with a file in them or without."""
        found = self.filesystem.get_file_info(fs.FileSelector(self.root, allow_not_found=True))
        return [info.base_name for info in found if info.type == fs.FileType.Directory]

    def read_json(self, name: str) -> Any:
        """What a file says; None without the file. Raises ValueError for what is no JSON."""
        try:
            with self.filesystem.open_input_stream(self.path(name)) as stream:
                return json.loads(stream.read())
        except FileNotFoundError:
            return None
        except (ValueError, RecursionError) as error:
            if isinstance(error, pa.ArrowException):
                raise
            raise ValueError(f"{self.path(name)} is damaged: {error}") from None

    def write_json(self, name: str, value: Any) -> None:
        """Write a file that is never seen half-written under its name."""
        self._make_parent(name)
        partial = self.path(name) + ".partial"
        with self.filesystem.open_output_stream(partial) as stream:
            stream.write((json.dumps(value, indent=2) + "\n").encode())
        self.filesystem.move(partial, self.path(name))

    def upload(self, source: Path, name: str) -> str:
        """Store a local file; its sha256."""
        self._make_parent(name)
        with source.open("rb") as file, self.filesystem.open_output_stream(self.path(name)) as out:
            return _copied(file, out)

    def _make_parent(self, name: str) -> None:
        self.filesystem.create_dir(self.path(name).rpartition("/")[0], recursive=True)

    def download(self, name: str, target: Path) -> str:
        """Bring a file here; its sha256."""
        target.parent.mkdir(parents=True, exist_ok=True)
        with self.filesystem.open_input_stream(self.path(name)) as file, target.open("wb") as out:
            return _copied(file, out)

    def sha256(self, name: str) -> str:
        """Of a file's bytes, in hexadecimal."""
        with self.filesystem.open_input_stream(self.path(name)) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def delete_file(self, name: str) -> None:
        """Delete a file, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self.filesystem.delete_file(self.path(name))

    def delete(self, name: str) -> None:
        """Delete a folder and what is in it, if it is there."""
        if self.filesystem.get_file_info(self.path(name)).type != fs.FileType.NotFound:
            self.filesystem.delete_dir(self.path(name))


def checkpoint_storage(config: TrainConfig) -> Storage:
    """Where a run's checkpoints lie: below `output_dir`, or in a folder of `output_dir`'s name
    below `checkpoint.storage_path`. Raises ValueError for a storage_path that cannot be one."""
    place = config.checkpoint.storage_path
    if place is None:
        return Storage.at(config.output_dir, CHECKPOINT_DIR)
    try:
        return Storage.at(place, Path(config.output_dir).name)
    except ValueError as error:
        raise ValueError(f"checkpoint.storage_path: {error}") from error


def _copied(source: BinaryIO | Any, target: BinaryIO | Any) -> str:
    """The sha256 of what was copied."""
    digest = hashlib.sha256()
    while chunk := source.read(_CHUNK_BYTES):
        digest.update(chunk)
        target.write(chunk)
    return digest.hexdigest()
