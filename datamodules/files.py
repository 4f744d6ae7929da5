"""Files that are complete whenever they exist under their name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def atomic_writer(path: str | Path) -> Iterator[IO[bytes]]:
    """Opens a file that takes its name when it is complete.

    The bytes are written to a temporary file in the same folder, flushed to the disk, and the temporary file replaces
    ``path`` in one step. Where the block raises, ``path`` is unchanged and the temporary file is removed. Several
    processes may write the same path: each has a temporary file of its own, and the last one to finish wins.

    Args:
        path: the file. Its folder must exist.

    Yields:
        The temporary file, open for binary writing.

    Raises:
        OSError: the file can't be written (no space, no permission).
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
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
        content: the bytes, or the text as UTF-8.

    Raises:
        OSError: the file can't be written (no space, no permission).
    """
    with atomic_writer(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)
