"""Lists and opens the files of a source: local paths, globs, folders and remote URLs, through fsspec.

A :class:`Location` stores no connection and no open file, so that it can be sent to worker processes; fsspec creates
and caches one file system per process.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from hashlib import blake2b
from io import BufferedReader, RawIOBase
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any, cast

import fsspec
from fsspec.core import split_protocol, url_to_fs

from datamodules.errors import UserError, one_line

if TYPE_CHECKING:
    from collections.abc import Callable

COMPRESSION_SUFFIXES = (".gz", ".zst")
REMOTE_READ_BYTES = 1 << 18  #: bytes of a read from a remote file; fsspec fetches and caches larger blocks
ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.zst")
#: keys under which file systems report a value that changes with a file's content, best first
_STAMP_KEYS = ("ETag", "etag", "checksum", "md5Hash", "mtime", "LastModified", "last_modified", "updated", "created")


@dataclass(frozen=True, slots=True)
class File:
    """A file of a source.

    Attributes:
        path: path inside its file system.
        name: path relative to the source; "" if the source is this one file.
        size: number of bytes.
        stamp: a text that changes with the content (etag or modification time).
    """

    path: str
    name: str
    size: int
    stamp: str


def is_record_file(name: str) -> bool:
    """Returns whether a file or a member can hold findings by its name; AppleDouble files (``._x``) can't."""
    path = PurePosixPath(name)
    if path.name.startswith("._") or "__MACOSX" in path.parts:
        return False
    return record_kind(name) != ""


def record_kind(name: str) -> str:
    """Returns the format of the records by a file's name: "json", "lines", "parquet", or "" for any other."""
    stem = name.lower()
    for suffix in COMPRESSION_SUFFIXES:
        stem = stem.removesuffix(suffix)
    if stem.endswith((".jsonl", ".ndjson")):
        return "lines"
    return "json" if stem.endswith(".json") else "parquet" if stem.endswith(".parquet") else ""


@dataclass(frozen=True)
class Location:
    """A path, glob or URL as the user gave it.

    Args:
        spec: the path, glob or URL.
        options: fsspec's storage options (credentials, endpoint).
    """

    spec: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def protocol(self) -> str:
        """The URL's protocol; "file" for a path."""
        return split_protocol(self.spec)[0] or "file"

    def filesystem(self) -> tuple[Any, str]:
        """Returns the file system and the source's path in it.

        Raises:
            UserError: the protocol is unknown, its package is not installed, or it does not take the storage options.
        """
        try:
            if not split_protocol(self.spec)[0]:  # url_to_fs would parse "::" in a path as a chain of URLs
                return fsspec.filesystem("file", **self.options), str(Path(self.spec).expanduser().absolute())
            return url_to_fs(self.spec, **self.options)
        except ImportError as error:
            raise UserError(f"data.sources={self.spec}: {one_line(error)}. Fix: install that package") from None
        except (ValueError, TypeError) as error:
            raise UserError(
                f"data.sources={self.spec}: can't use {self.protocol}:// ({one_line(error)}). Fix: check the protocol "
                "and storage_options"
            ) from None

    def open(self, file: File) -> IO[bytes]:
        """Opens one of the files."""
        if self.protocol in ("file", "local"):
            return Path(file.path).open("rb")  # fsspec's own wrapper costs a call on each read
        remote = _RemoteFile(self.filesystem()[0].open(file.path, "rb"))
        return cast("IO[bytes]", BufferedReader(remote, REMOTE_READ_BYTES))

    def files(self) -> tuple[list[File], bool]:
        """Lists the files, sorted by name.

        Returns:
            The files, and whether the source is one file.

        Raises:
            UserError: the source does not exist, or the storage can't be read.
        """
        filesystem, path = self.filesystem()
        try:
            if not filesystem.exists(path):
                if any(wildcard in self.spec for wildcard in "*?["):
                    return self._matches(filesystem, path), False
                raise UserError(
                    f"data.sources={self.spec}: no such file or folder. Fix: give an existing path, a glob or a URL"
                )
            if filesystem.isfile(path):
                return [_file(filesystem.info(path), path, "")], True
            infos = filesystem.find(path, detail=True)
        except UserError:
            raise
        except Exception as error:  # each storage has its own exceptions: credentials, network, permissions
            raise UserError(
                f"data.sources={self.spec}: can't be read ({one_line(error)}). Fix: check the path and storage_options"
            ) from None
        files = [_file(info, name, name[len(path) :].lstrip("/")) for name, info in sorted(infos.items())]
        return [file for file in files if is_record_file(file.name)], False

    def _matches(self, filesystem: Any, pattern: str) -> list[File]:
        infos = sorted(filesystem.glob(pattern, detail=True).items())
        if archives := [name for name, _ in infos if name.endswith(ARCHIVES)]:
            raise UserError(
                f"data.sources={self.spec}: a glob can't match archives ({archives[0]}). Fix: name each archive in "
                "data.sources"
            )
        if not infos:
            raise UserError(f"data.sources={self.spec}: no file matches. Fix: check the pattern")
        root = _common_root([name for name, _ in infos])
        files = [_file(info, name, name[len(root) :]) for name, info in infos if info.get("type") != "directory"]
        return [file for file in files if is_record_file(file.name)]


class _RemoteFile(RawIOBase):
    """A file of a remote file system, whose errors it converts to OSError: each storage has its own exceptions."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._call(self._file.read, len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self._call(self._file.seek, offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def close(self) -> None:
        self._file.close()
        super().close()

    def _call(self, function: Callable[..., Any], *arguments: int) -> Any:
        try:
            return function(*arguments)
        except OSError:
            raise
        except Exception as error:
            raise OSError(f"{type(error).__name__}: {error}") from error


def fingerprint(files: list[File]) -> str:
    """Returns a digest of the files' names, sizes and stamps."""
    text = "\n".join(f"{file.name}\0{file.size}\0{file.stamp}" for file in files)
    return blake2b(text.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()


def _file(info: dict[str, Any], path: str, name: str) -> File:
    stamp = next((str(info[key]) for key in _STAMP_KEYS if info.get(key) is not None), "")
    return File(path, name, int(info.get("size") or 0), stamp)


def _common_root(paths: list[str]) -> str:
    parents = [str(PurePosixPath(path).parent) for path in paths]
    root = min(parents, key=len)
    while not all(parent == root or parent.startswith(root.rstrip("/") + "/") for parent in parents):
        root = str(PurePosixPath(root).parent)
    return root.rstrip("/") + "/"
