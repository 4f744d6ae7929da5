"""Finds and reads the reports of ``--report``: files, folders, globs and archives.

A report is a regular file of at most :data:`MAX_REPORT_BYTES`. The members of an archive are read from its stream and
never extracted; a member's path is only a name. A report that can't be read costs itself and no other report.
"""

from __future__ import annotations

import glob
import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from commands.analyze.assessment.evidence import host_of, scanner_failures, skipped_findings
from commands.analyze.assessment.trust import require_readable
from commands.analyze.markdown import visible
from commands.analyze.several.names import distinct_names, work_names
from datamodules.errors import UserError, one_line
from datamodules.sources.byte_stream import ByteStream, compression_of, read_all
from datamodules.sources.decompression import GZIP_MAGIC, ZSTD_MAGIC, DecompressionLimits, inflate, loads
from datamodules.sources.field_coercion import InvalidRecord
from datamodules.sources.filesystem import ARCHIVES, is_record_file, record_kind
from datamodules.sources.formats import Parsed
from datamodules.sources.scanner_report import raw_reference, read_report
from datamodules.sources.tar_reader import tar_members

#: largest size of a report, uncompressed: a scan of a host has 230 bytes per finding, so that this is 290,000 findings
MAX_REPORT_BYTES = 64 << 20
LIMITS = DecompressionLimits(member_bytes=MAX_REPORT_BYTES)
TOO_LARGE = f"larger than {MAX_REPORT_BYTES >> 20} MiB"
KINDS = (
    (stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a FIFO"), (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ReportFile:
    """A report that is not read yet.

    Attributes:
        name: distinct name, a relative path without "..", for results; "" for a single file until all are listed.
        path: the file, or the archive.
        size: number of bytes, of a member uncompressed.
        offset: offset of a member in the uncompressed archive; None for a file.
        problem: the reason that it can't be read, if that is known already.
        label: path for messages, as the user wrote it.
    """

    name: str
    path: Path
    size: int = 0
    offset: int | None = None
    problem: str = ""
    label: str = ""


@dataclass(slots=True)
class Inputs:
    """The reports of ``--report``.

    Attributes:
        reports: in the order of the values, and by name within a folder or a glob.
        several: whether a value is a folder, a glob or an archive, or there is more than one value.
        ignored: number of files in folders and archives whose name is not that of a report.
        folders: the folders among the values.
    """

    reports: list[ReportFile] = field(default_factory=list)
    several: bool = False
    ignored: int = 0
    folders: list[Path] = field(default_factory=list)


@dataclass(slots=True)
class Report:
    """A report that was read.

    Attributes:
        parsed: the usable part.
        reference: the ``raw_reference`` of the report's analysis.
    """

    parsed: Parsed
    reference: dict[str, Any]


def find_reports(values: Sequence[str], output: Path) -> Inputs:
    """Lists the reports, without reading them.

    A value that does not exist, or has no report, becomes a report with a problem.

    Args:
        values: files, folders, globs and archives.
        output: file or folder of the results, whose files are no reports.
    """
    inputs, output = Inputs(several=len(values) > 1), output.resolve()
    for value in values:
        path = Path(value).expanduser()
        if value and os.path.lexists(path):
            _add(inputs, path, output)
        elif not glob.has_magic(value):
            inputs.reports.append(_unreadable(path, "No such file or folder", value or "''"))
        else:
            inputs.several = True
            matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]  # noqa: PTH207
            matches = [match for match in matches if not _is_result(match, output)]
            for match in matches:
                _add(inputs, match, output)
            if not matches:
                inputs.reports.append(_unreadable(path, "no file matches", value))
    names = distinct_names(_names(inputs.reports))
    inputs.reports = [
        replace(report, name=name, label=visible(report.label))
        for report, name in zip(inputs.reports, names, strict=True)
    ]
    return inputs


def read_all_reports(reports: Sequence[ReportFile]) -> Iterator[tuple[ReportFile, bytes | str]]:
    """Yields each report with its bytes, or with the reason that it can't be read.

    Only one report is in memory at a time. Consecutive members of an archive are read in one pass over it.
    """
    stream, opened = None, None
    try:
        for report in reports:
            try:
                if report.problem:
                    raise InvalidRecord("", report.problem)
                if report.offset is None:
                    data = read_file(report.path)
                else:
                    if stream is None or opened != report.path:
                        if stream is not None:
                            stream.close()
                        stream, opened = open_archive(report.path), report.path
                    stream.seek(report.offset)
                    data = read_all(stream, report.size, LIMITS)
                if data.startswith((GZIP_MAGIC, ZSTD_MAGIC)):
                    data = inflate(data, LIMITS)
            except InvalidRecord as error:
                yield report, error.detail or error.reason
            except OSError as error:
                yield report, error.strerror or one_line(error)
            else:
                yield report, data
    finally:
        if stream is not None:
            stream.close()


def read_file(path: Path) -> bytes:
    """Reads a regular file of bounded size.

    Raises:
        InvalidRecord: it is a device, a FIFO or a folder, or too large.
        OSError: it can't be read.
    """
    _check_regular(path.stat())  # before opening: opening a device can have an effect
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        _check_regular(os.fstat(descriptor))  # another file may have taken the name, and O_NONBLOCK does not wait
        data = file.read(MAX_REPORT_BYTES + 1)
    if len(data) > MAX_REPORT_BYTES:
        raise InvalidRecord("too_large", TOO_LARGE)
    return data


def open_archive(path: Path) -> ByteStream:
    """Opens the uncompressed bytes of an archive.

    Raises:
        InvalidRecord: it is no regular file.
        OSError: it can't be read.
    """
    _check_regular(path.stat())
    with path.open("rb") as file:
        compression = compression_of(file.read(4))
    return ByteStream(lambda: path.open("rb"), compression)


def parse_report(data: bytes, file: ReportFile, limit: int | None, with_raw: bool = False) -> Report:
    """Parses a report.

    Args:
        data: the report's bytes, uncompressed.
        file: for messages and for the document's ``raw_reference``.
        limit: largest number of findings; None for all.
        with_raw: whether the reference holds the raw scan too, as in a version-4 document.

    Raises:
        UserError: the bytes are no scanner report, or none of its findings is usable.
    """
    try:
        value, _ = loads(data)
    except InvalidRecord as error:
        problem = error.detail or error.reason
        raise UserError(
            f"--report {file.label}: not readable as JSON: {problem}. Fix: give a scanner's report."
        ) from error
    parsed = read_report(value, f"--report {file.label}")
    document, unusable = parsed.document, parsed.quarantined
    try:
        require_readable(value, parsed, f"--report {file.label}")
    except UserError as error:
        raise UserError(visible(error, 2000)) from None  # it has texts of the report
    reference = raw_reference(value, document.findings) if with_raw else {}
    reference |= {
        "file": file.name,
        "sha256": hashlib.sha256(data).hexdigest(),
        "host": host_of(value),
        "findings": len(document.findings),
        "repairs": dict(parsed.repairs),
        "unusable": [{"position": bad.position, "reason": bad.reason, "detail": bad.detail} for bad in unusable],
    } | scanner_failures(value)
    if limit is not None and limit < len(document.findings):
        reference |= {"limit": limit, "skipped": skipped_findings(document.findings[limit:])}
        document.findings[limit:] = []
    return Report(parsed, reference)


def _add(inputs: Inputs, path: Path, output: Path) -> None:
    """Adds a file, the files of a folder, or the members of an archive."""
    if path.is_dir():
        prefix = f"{path.resolve().name}/" if inputs.several else ""
        inputs.several = True
        inputs.folders.append(path)
        _add_folder(inputs, path, output, prefix)
    elif path.name.lower().endswith(ARCHIVES):
        inputs.several = True
        _add_archive(inputs, path, path.name)
    else:
        inputs.reports.append(ReportFile("", path, _size(path), label=str(path)))


def _names(reports: Sequence[ReportFile]) -> list[str]:
    """Returns the reports' names; those of single files are relative to the folder that all single files are in.

    Fleets are often collected as ``HOST/report.json``.
    """
    files = [os.path.abspath(report.path.parent) for report in reports if not report.name]  # noqa: PTH100
    root = os.path.commonpath(files) if files else ""
    return [report.name or os.path.relpath(report.path, root) for report in reports]


def _add_folder(inputs: Inputs, folder: Path, output: Path, prefix: str) -> None:
    """Adds the files of a folder; ``prefix`` is the start of their names."""
    count = len(inputs.reports)
    errors: list[OSError] = []
    for parent, folders, files in os.walk(folder, onerror=errors.append):
        folders[:] = sorted(name for name in folders if not _is_result(Path(parent, name), output))
        for name in sorted(files):
            path = Path(parent, name)
            inside = prefix + str(path.relative_to(folder))
            if _is_result(path, output):
                continue
            if name.lower().endswith(ARCHIVES):
                _add_archive(inputs, path, inside)
            elif _is_report_name(name):
                inputs.reports.append(ReportFile(inside, path, _size(path), label=str(path)))
            else:
                inputs.ignored += 1
    inputs.reports += [_unreadable(Path(error.filename), _detail(error)) for error in errors]
    if len(inputs.reports) == count:
        inputs.reports.append(_unreadable(folder, "the folder has no .json file"))


def _add_archive(inputs: Inputs, path: Path, name: str) -> None:
    """Adds the members of an archive, which are named by their path in it."""
    count = len(inputs.reports)
    try:
        stream = open_archive(path)
    except (OSError, InvalidRecord) as error:
        inputs.reports.append(_unreadable(path, _detail(error)))
        return
    largest = max(LIMITS.ratio_floor, LIMITS.ratio * _size(path))
    try:
        for member in tar_members(stream):
            label = f"{path}/{member.name}"
            if member.error is not None:
                inputs.reports.append(_unreadable(path, f"damaged archive: {_detail(member.error)}"))
            elif member.size > largest:  # skipping it would take as long as reading it
                problem = f"decompression bomb: {visible(member.name)} has {member.size} bytes; the rest is not read"
                inputs.reports.append(_unreadable(path, problem))
                break
            elif not _is_report_name(member.name):
                inputs.ignored += 1
            elif member.size > MAX_REPORT_BYTES:
                inputs.reports.append(_unreadable(path, TOO_LARGE, label))
            else:
                inputs.reports.append(ReportFile(f"{name}/{member.name}", path, member.size, member.data, label=label))
    finally:
        stream.close()
    if len(inputs.reports) == count:
        inputs.reports.append(_unreadable(path, "the archive has no .json file"))


def _unreadable(path: Path, problem: str, label: str = "") -> ReportFile:
    return ReportFile(label or path.name, path, problem=problem, label=label or str(path))


def _is_report_name(name: str) -> bool:
    return is_record_file(name) and record_kind(name) == "json"


def _is_result(path: Path, output: Path) -> bool:
    """Returns whether a path is the output, or a file or folder that ``analyze`` keeps next to it."""
    try:
        resolved = path.resolve()
    except (OSError, RuntimeError):  # a loop of links
        return False
    return resolved == output or (resolved.parent == output.parent and resolved.name in work_names(output.name))


def _check_regular(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = next((kind for test, kind in KINDS if test(status.st_mode)), "no file")
        raise InvalidRecord("not_a_regular_file", f"{kind}, not a regular file")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _detail(error: OSError | InvalidRecord) -> str:
    if isinstance(error, InvalidRecord):
        return error.detail or error.reason
    return error.strerror or one_line(error)
