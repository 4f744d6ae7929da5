"""Where a source's files lie: local paths, globs, folders and remote URLs, through fsspec.

A :class:`Location` holds no connection and no open file, so that it can be sent to worker processes; fsspec hands out
the right file system of the process that asks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from hashlib import blake2b
from io import BufferedReader, RawIOBase
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any, cast

import fsspec
from fsspec.core import split_protocol

from datamodules.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

RECORDS = (".json", ".jsonl", ".ndjson", ".parquet")
PACKINGS = ("", ".gz", ".zst")
REMOTE_PIECE = 1 << 18  #: bytes asked of a remote file at a time; fsspec fetches and keeps larger blocks
ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.zst")
#: what a file system calls that changes with a file's content, best first
_STAMPS = ("ETag", "etag", "checksum", "md5Hash", "mtime", "LastModified", "last_modified", "updated", "created")


@dataclass(frozen=True, slots=True)
class File:
    """A file of a source.

    Attributes:
        path: path inside its file system.
        name: path relative to the source; "" where the source is this one file.
        size: bytes.
        stamp: changes when the content does (etag or modification time).
    """

    path: str
    name: str
    size: int
    stamp: str


def is_record_file(name: str) -> bool:
    """Tells by its name whether a file or a member can hold findings; AppleDouble companions (``._x``) can't."""
    path = PurePosixPath(name)
    if path.name.startswith("._") or "__MACOSX" in path.parts:
        return False
    return record_kind(name) != ""


def record_kind(name: str) -> str:
    """Names the records' form by a file's name: "json", "lines", "parquet" or ""."""
    stem = name.lower()
    for packing in PACKINGS[1:]:
        stem = stem.removesuffix(packing)
    if stem.endswith((".jsonl", ".ndjson")):
        return "lines"
    return "json" if stem.endswith(".json") else "parquet" if stem.endswith(".parquet") else ""


@dataclass(frozen=True)
class Location:
    """A path, glob or URL as the user gave it.

    Args:
        spec: the text.
        options: fsspec's storage options (credentials, endpoint).
    """

    spec: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def filesystem(self) -> Any:
        """The file system; fsspec keeps one for each process."""
        protocol = split_protocol(self.spec)[0] or "file"
        try:
            return fsspec.filesystem(protocol, **self.options)
        except ImportError as error:
            raise UserError(f"source {self.spec}: {error}") from None
        except (ValueError, TypeError) as error:
            raise UserError(f"source {self.spec}: can't use {protocol}:// ({error}); check storage_options") from None

    def open(self, file: File) -> IO[bytes]:
        """Opens one of the files."""
        if (split_protocol(self.spec)[0] or "file") in ("file", "local"):
            return Path(file.path).open("rb")  # fsspec's own wrapper costs a call on each read
        return cast("IO[bytes]", BufferedReader(_Remote(self.filesystem.open(file.path, "rb")), REMOTE_PIECE))

    def files(self) -> tuple[list[File], bool]:
        """Lists the files, sorted by name, and tells whether the source is one file.

        Raises:
            UserError: nothing there, or the storage can't be read.
        """
        files = self.filesystem
        try:
            path = files._strip_protocol(
                self.spec if split_protocol(self.spec)[0] else str(Path(self.spec).expanduser())
            )
            if not files.exists(path):
                if any(sign in self.spec for sign in "*?["):
                    return self._matches(files, path), False
                raise UserError(f"source {self.spec}: no such file or folder; give an existing path, a glob or a URL")
            if files.isfile(path):
                return [_file(files.info(path), path, "")], True
            found = files.find(path, detail=True)
        except UserError:
            raise
        except Exception as error:  # each storage has its own exceptions: credentials, network, permissions
            raise UserError(
                f"source {self.spec}: can't be read ({error}); check the path and storage_options"
            ) from None
        named = [_file(info, name, name[len(path) :].lstrip("/")) for name, info in sorted(found.items())]
        return [file for file in named if is_record_file(file.name)], False

    def _matches(self, files: Any, pattern: str) -> list[File]:
        found = sorted(files.glob(pattern, detail=True).items())
        if archives := [name for name, _ in found if name.endswith(ARCHIVES)]:
            raise UserError(
                f"source {self.spec}: a glob can't match archives ({archives[0]}); name each in data.init_args.sources"
            )
        if not found:
            raise UserError(f"source {self.spec}: no file matches; check the pattern")
        root = _common_root([name for name, _ in found])
        named = [_file(info, name, name[len(root) :]) for name, info in found if info.get("type") != "directory"]
        return [file for file in named if is_record_file(file.name)]


class _Remote(RawIOBase):
    """A file of another file system whose every error is an OSError: each storage has exceptions of its own."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._ask(self._file.read, len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self._ask(self._file.seek, offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def close(self) -> None:
        self._file.close()
        super().close()

    def _ask(self, function: Callable[..., Any], *arguments: int) -> Any:
        try:
            return function(*arguments)
        except OSError:
            raise
        except Exception as error:
            raise OSError(f"{type(error).__name__}: {error}") from error


def fingerprint(files: list[File]) -> str:
    """Digest of names, sizes and stamps."""
    text = "\n".join(f"{file.name}\0{file.size}\0{file.stamp}" for file in files)
    return blake2b(text.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()


def _file(info: dict[str, Any], path: str, name: str) -> File:
    stamp = next((str(info[key]) for key in _STAMPS if info.get(key) is not None), "")
    return File(path, name, int(info.get("size") or 0), stamp)


def _common_root(paths: list[str]) -> str:
    parents = [str(PurePosixPath(path).parent) for path in paths]
    root = min(parents, key=len)
    while not all(parent == root or parent.startswith(root.rstrip("/") + "/") for parent in parents):
        root = str(PurePosixPath(root).parent)
    return root.rstrip("/") + "/"
