"""Writes the results of ``analyze`` to a file, to a folder with one file per report, or to JSON Lines.

A result is complete whenever it exists under its name. A folder records which results belong to which report and
settings, so that the same command continues after an interrupt or a kill with the reports that are not done.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Self

from commands.analyze.several.names import SET_ASIDE
from datamodules.errors import UserError, one_line
from datamodules.files import atomic_write, atomic_writer

if TYPE_CHECKING:
    from commands.analyze.inputs import Inputs

SUFFIXES = {"markdown": ".md", "html": ".html"}  #: file name suffixes of the formats that are not JSON
STATE = ".analyze"  #: folder of the state inside of a folder of results
_TEMPORARY = re.compile(r"\.\d+-[0-9a-f]{8}\.tmp$")  #: of ``datamodules.files``, left by a killed process


class Results:
    """Receives the analyses of reports. A context manager, which holds the output.

    Attributes:
        target: file or folder, for messages.
        answers: file for the model's answers of the report that is being analysed.
    """

    target: Path
    answers: Path

    def __enter__(self) -> Self:
        """Returns the object."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Releases the output."""
        self.close()

    def close(self) -> None:
        """Releases the output for other processes."""

    def is_done(self, name: str, key: str) -> bool:
        """Returns whether the whole result of a report exists, for the same content and settings."""
        return False

    def write(self, name: str, key: str, text: str) -> None:
        """Writes the result of a report in one step, and removes the file of answers.

        Args:
            name: name of the report.
            key: digest of the report's content and of the settings.
            text: the result.

        Raises:
            UserError: the file can't be written.
        """
        raise NotImplementedError

    def discard(self, name: str) -> None:
        """Removes an earlier result of a report that can't be read any more."""

    def finish(self, set_aside: Sequence[dict[str, str]]) -> None:
        """Completes the output when every report was analysed or set aside.

        Args:
            set_aside: the reports that can't be read.

        Raises:
            UserError: a file can't be written.
        """


def open_results(output: str, inputs: Inputs, format: str) -> Results:
    """Returns the results for the value of ``--output``, and checks that they can be written.

    Args:
        output: a name with suffix ``.jsonl`` is JSON Lines; an existing folder, a name that ends with a slash, or a
            name without a suffix if there are several reports, is a folder; any other name is a file.
        inputs: the reports.
        format: value of ``--format``.

    Raises:
        UserError: the output can't be written, does not fit the number of reports or the format, or is in use.
    """
    target = Path(output).expanduser()
    is_folder = target.is_dir() or output.endswith("/") or (inputs.several and not target.suffix)
    if not is_folder and target.suffix == ".jsonl":
        if format in SUFFIXES:
            raise UserError(f"--output {output}: JSON Lines can't hold --format {format}. Fix: name a folder.")
    elif not is_folder and len(inputs.reports) != 1:
        folder = target.with_suffix("")
        raise UserError(
            f"--output {output}: one file can't hold {len(inputs.reports)} reports. Fix: name a folder ({folder}/) or "
            f"JSON Lines ({folder}.jsonl)."
        )
    if not is_folder:
        _check_file(target, output, inputs)
    elif any(target.resolve() == folder.resolve() for folder in inputs.folders):
        raise UserError(f"--output {output}: this is the folder of the reports. Fix: choose another folder.")
    try:
        _check_writable(target if is_folder else target.parent)
        if is_folder:
            return FolderResults(target, SUFFIXES.get(format, ".json"), inputs)
        return LinesResults(target, inputs) if target.suffix == ".jsonl" else FileResult(target)
    except OSError as error:
        raise _cannot_write(target, error) from error


class FileResult(Results):
    """The result of one report in one file. The answers of an interrupted run are kept next to it."""

    def __init__(self, target: Path) -> None:
        self.target, self.answers = target, target.with_name(f"{target.name}.partial.jsonl")

    def write(self, name: str, key: str, text: str) -> None:
        """Writes the file."""
        try:
            atomic_write(self.target, text)
            self.answers.unlink(missing_ok=True)
        except OSError as error:
            raise _cannot_write(self.target, error) from error


class FolderResults(Results):
    """One result file per report in a folder, and the state of the work in its subfolder :data:`STATE`.

    The state has one JSON line per result with the report's name, its key and the SHA-256 of the result. The line is
    written before the result, and a result counts only if its content has that SHA-256.

    Args:
        target: the folder.
        suffix: file name suffix of the results.
        inputs: the reports.

    Raises:
        UserError: another process writes to the folder, or a result would replace a file that ``analyze`` did not
            write.
    """

    def __init__(self, target: Path, suffix: str, inputs: Inputs) -> None:
        self.target, self.folder, self.suffix = target, target, suffix
        self._open(inputs)

    def _open(self, inputs: Inputs) -> None:
        state = self.folder / STATE
        state.mkdir(parents=True, exist_ok=True)
        self.answers, self._record = state / "answers.jsonl", state / "done.jsonl"
        self._lock: IO[str] | None = _lock(state / "lock", self.target)
        self._done = _read_records(self._record)
        paths = {self.path(report.name): report.name for report in inputs.reports}
        for path, name in paths.items():
            if name not in self._done and path.exists():
                self.close()
                raise UserError(
                    f"--output {self.target}: {path} exists and is no result of this command. Fix: choose another "
                    "folder."
                )
        for file in [file for parent in {path.parent for path in paths} for file in parent.glob("*.tmp")]:
            match = _TEMPORARY.search(file.name)
            if match and file.with_name(file.name[: match.start()]) in paths:
                file.unlink(missing_ok=True)

    def close(self) -> None:
        """Releases the folder for other processes."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def path(self, name: str) -> Path:
        """Returns the result file of a report's name."""
        return self.folder / (name.removesuffix(".json") + self.suffix)

    def is_done(self, name: str, key: str) -> bool:
        """Returns whether the whole result of a report exists, for the same content and settings."""
        record = self._done.get(name)
        if record is None or record["key"] != key:
            return False
        try:
            return _sha256(self.path(name).read_bytes()) == record["sha256"]
        except OSError:
            return False

    def write(self, name: str, key: str, text: str) -> None:
        """Writes a result."""
        record, path = {"name": name, "key": key, "sha256": _sha256(text.encode())}, self.path(name)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with self._record.open("a", encoding="utf-8") as file:
                file.write("\n" + json.dumps(record))  # the newline is first: it ends a line that a kill has cut short
            atomic_write(path, text)
            self.answers.unlink(missing_ok=True)
        except OSError as error:
            raise _cannot_write(path, error) from error
        self._done[name] = record

    def discard(self, name: str) -> None:
        """Removes an earlier result of a report that can't be read any more."""
        if name in self._done:
            self.path(name).unlink(missing_ok=True)

    def finish(self, set_aside: Sequence[dict[str, str]]) -> None:
        """Writes the list of the reports that were set aside."""
        self._write_set_aside(self.folder / SET_ASIDE, set_aside)

    @staticmethod
    def _write_set_aside(path: Path, set_aside: Sequence[dict[str, str]]) -> None:
        try:
            if set_aside:
                atomic_write(path, json.dumps(list(set_aside), indent=2) + "\n")
            else:
                path.unlink(missing_ok=True)
        except OSError as error:
            raise _cannot_write(path, error) from error


class LinesResults(FolderResults):
    """One JSON line per report, in the order of the reports.

    The results are collected in the folder ``TARGET.partial`` and joined when all reports are done.
    """

    def __init__(self, target: Path, inputs: Inputs) -> None:
        self.target, self.folder, self.suffix = target, target.with_name(f"{target.name}.partial"), ".json"
        self._names = [report.name for report in inputs.reports]
        if self.folder.exists() and not (self.folder / STATE).is_dir():
            raise UserError(f"--output {target}: {self.folder} exists and is no part of it. Fix: choose another file.")
        self._open(inputs)

    def write(self, name: str, key: str, text: str) -> None:
        """Writes a result on one line; ``text`` is a JSON document."""
        super().write(name, key, json.dumps(json.loads(text), ensure_ascii=True) + "\n")

    def finish(self, set_aside: Sequence[dict[str, str]]) -> None:
        """Joins the results and removes the folder."""
        unread = {record["name"] for record in set_aside}
        names = [name for name in self._names if name not in unread]
        try:
            if names:
                with atomic_writer(self.target) as file:
                    for name in names:
                        file.write(self.path(name).read_bytes())
        except OSError as error:
            raise _cannot_write(self.target, error) from error
        self._write_set_aside(self.target.with_name(f"{self.target.name}.{SET_ASIDE}"), set_aside)
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def _check_file(target: Path, output: str, inputs: Inputs) -> None:
    if target.exists() and not target.is_file():
        raise UserError(f"--output {output}: not a regular file. Fix: choose another file.")
    for report in inputs.reports:
        if target.exists() and report.path.exists() and target.samefile(report.path):
            raise UserError(f"--output {output}: this is the report itself. Fix: choose another file.")


def _check_writable(folder: Path) -> None:
    """Creates a folder and a file in it, so that a read-only or full disk is reported before the model is loaded."""
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_writer(folder / ".analyze-check") as file:
        file.write(b"check\n")
    (folder / ".analyze-check").unlink(missing_ok=True)


def _lock(path: Path, target: Path) -> IO[str]:
    file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UserError(
            f"--output {target}: another analyze command writes there. Fix: wait for it, or choose another output."
        ) from None
    except OSError:  # a network file system without locks
        pass
    return file


def _read_records(path: Path) -> dict[str, dict[str, Any]]:
    """Reads the last record of each result; a line that a kill has cut short is skipped."""
    records: dict[str, dict[str, Any]] = {}
    if not path.is_file():
        return records
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
            records[record["name"]] = {"key": record["key"], "sha256": record["sha256"]}
        except (ValueError, TypeError, KeyError):
            continue
    return records


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _cannot_write(path: Path, error: OSError) -> UserError:
    return UserError(f"--output {path}: {error.strerror or one_line(error)}. Fix: choose another file or folder.")
