"""Writes files that are complete whenever they exist under their name."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def atomic_writer(path: str | Path) -> Iterator[IO[bytes]]:
    """Opens a file that takes its name when it is complete.

    The bytes are written to a temporary file in the same folder, flushed to the disk, and the temporary file replaces
    ``path`` in one step. If the block raises, ``path`` is unchanged and the temporary file is removed. Several threads,
    processes or machines may write the same path: each has its own temporary file, and the last one to finish wins.

    Args:
        path: the file. Its folder must exist.

    Yields:
        The temporary file, open for binary writing.

    Raises:
        OSError: the file can't be written (no space, no permission).
    """
    path = Path(path)
    # the process id alone is not unique on a shared file system: containers on two hosts often have the same ids
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write(path: str | Path, content: str | bytes) -> None:
    """Writes a whole file in one step; see :func:`atomic_writer`.

    Args:
        path: the file. Its folder must exist.
        content: the bytes, or the text, which is written as UTF-8. A lone surrogate, such as a name that is not UTF-8
            contains, is written as an escape sequence, which is valid inside a string of JSON.

    Raises:
        OSError: the file can't be written (no space, no permission).
    """
    with atomic_writer(path) as file:
        file.write(content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content)
