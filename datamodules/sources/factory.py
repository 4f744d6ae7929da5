"""Opens sources: an archive, a folder, a file, a remote URL, a Hugging Face dataset, or generated findings.

:func:`open_source` determines the kind by the content if possible. ``Source.raw_documents`` then yields the bytes of
each document with its place, and :func:`~datamodules.sources.formats.parse` decompresses and parses them: several
workers can read one archive, and each parses only its own documents. Reading can begin at any place; an archive with a
``cache_dir`` is then not read from its start (:mod:`datamodules.sources.seek_index`).

An unreadable document is yielded too, and ``parse`` quarantines it; only an unusable source raises a ``UserError``.
Reading and parsing a ``.tar.gz`` of real envelopes: 20,000 findings/s and more on one core.
"""

from __future__ import annotations

import shutil
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from datamodules.errors import UserError
from datamodules.sources.byte_stream import ByteStream, compression_of
from datamodules.sources.decompression import DEFAULT_LIMITS, DecompressionLimits, is_json_object
from datamodules.sources.field_coercion import InvalidRecord
from datamodules.sources.filesystem import File, Location, record_kind
from datamodules.sources.formats import parse
from datamodules.sources.huggingface import HuggingFace
from datamodules.sources.readers import Archive, Deferred, Files, Source
from datamodules.sources.tar_reader import BLOCK

HEAD_BYTES = 1 << 16  #: bytes at the start of a file by which its kind is determined
CHECKED_DOCUMENTS = 16  #: number of documents that are parsed to check that a source holds findings
CHECKED_BYTES = 8 << 20  #: a larger document is not parsed for that check, and counts as good
USABLE_SOURCES = "give a batch document, JSON Lines, Parquet or a tar archive of these"


def open_source(
    spec: str,
    *,
    storage_options: dict[str, Any] | None = None,
    cache_dir: Path | None = None,
    limits: DecompressionLimits = DEFAULT_LIMITS,
) -> Source:
    """Opens a source and parses its first documents as a check.

    Args:
        spec: a folder, an archive (``.tar``, ``.tar.gz``, ``.tar.zst``), a JSON, JSON Lines or Parquet file (also
            compressed), a glob, an fsspec URL of any of these, ``hf://datasets/NAME?split=train``, or
            ``synthetic://?findings=N&seed=S``.
        storage_options: fsspec's options for a remote source.
        cache_dir: folder for the seek points that are found while reading, and for synthetic shards.
        limits: limits on the size of decompressed data.

    Raises:
        UserError: the source does not exist, is empty, or holds no findings.
    """
    if spec.startswith("synthetic://"):
        return _synthetic(spec, cache_dir)
    if spec.startswith("hf://datasets/"):
        source: Source = HuggingFace(spec)
    else:
        location = Location(spec, storage_options or {})
        files, is_one_file = location.files()
        if not files:
            raise UserError(f"data.sources={spec}: no .json, .jsonl or .parquet file in it. Fix: {USABLE_SOURCES}")
        source = _file_source(location, files[0], cache_dir, limits) if is_one_file else Files(location, files)
    _check(source, limits)
    return source


def _file_source(location: Location, file: File, cache_dir: Path | None, limits: DecompressionLimits) -> Source:
    """Chooses the reader of a single file by its first bytes, and by its name if they don't determine the kind."""
    try:
        with location.open(file) as opened:
            head = opened.read(HEAD_BYTES)
            if file.size > HEAD_BYTES:
                opened.seek(-4, 2)  # a server without range requests fails only at such a seek
                opened.read(4)
        compression = compression_of(head)
        if compression:
            stream = ByteStream(lambda: location.open(file), compression)
            try:
                head = stream.read(HEAD_BYTES)
            finally:
                stream.close()
    except OSError as error:
        raise UserError(
            f"data.sources={location.spec}: can't be read ({error.strerror or error}). Fix: check its permissions, or "
            "fetch it first"
        ) from None
    except InvalidRecord as error:
        raise UserError(
            f"data.sources={location.spec}: damaged from its start ({error}). Fix: fetch it again"
        ) from None
    if not head.strip():
        raise UserError(f"data.sources={location.spec}: is empty. Fix: {USABLE_SOURCES}")
    kind = _kind(head, file.path)
    if not kind:
        raise UserError(
            f"data.sources={location.spec}: neither JSON nor Parquet nor a tar archive of these. Fix: {USABLE_SOURCES}"
        )
    if kind in ("tar", "lines"):
        return Archive(location, file, kind, compression, cache_dir, limits)
    return Files(location, [file], kind)


def _kind(head: bytes, name: str) -> str:
    """Determines the kind of a file: "tar", "parquet", "lines", "json", or "" for any other.

    Args:
        head: its first uncompressed bytes.
        name: its name.
    """
    if head.startswith(b"PAR1"):
        return "parquet"
    if head[257:262] == b"ustar" or (len(head) >= BLOCK and not head[:BLOCK].strip(b"\0")):
        return "tar"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    by_name = record_kind(name)
    if not text.startswith((b"{", b"[")):
        return by_name if by_name in ("json", "lines") else ""  # with such a name it is quarantined with a reason
    first, _, rest = text.partition(b"\n")
    if not rest.strip():  # one line, or a line that is longer than the head
        return "lines" if by_name == "lines" else "json"
    if by_name != "lines":
        return "lines" if is_json_object(first) else "json"
    # under this name, one valid line in the head distinguishes it from a document that is indented over many lines
    return "lines" if any(map(is_json_object, text.splitlines())) or len(first.strip()) > 1 else "json"


def _check(source: Source, limits: DecompressionLimits) -> None:
    """Raises a UserError if none of a source's first documents holds a finding or a correlation."""
    reasons: list[str] = []
    num_documents = 0
    for raw in islice(source.raw_documents(), CHECKED_DOCUMENTS):
        num_documents += 1
        size = raw.payload.file.size if isinstance(raw.payload, Deferred) else 0
        if size > CHECKED_BYTES or (isinstance(raw.payload, bytes) and len(raw.payload) > CHECKED_BYTES):
            return
        parsed = parse(raw, limits)
        if parsed.document.findings or parsed.document.correlations:
            return
        reasons += [f"{entry.reason} {entry.detail}".strip() for entry in parsed.quarantined]
    if any(reason.startswith("scanner_report") for reason in reasons):
        raise UserError(
            f"data.sources={source.spec}: a scanner report, which `analyze` reads, has no answers to learn from. "
            f"Fix: {USABLE_SOURCES}"
        )
    if num_documents < CHECKED_DOCUMENTS:
        reason = reasons[0] if reasons else "empty"
        raise UserError(f"data.sources={source.spec}: holds no findings ({reason}). Fix: {USABLE_SOURCES}")


def _synthetic(spec: str, cache_dir: Path | None) -> Source:
    """Generates shards into the cache, unless they are there already, and opens them as a folder."""
    from datamodules.pretrained.locate import cache_root
    from datamodules.synthetic import GENERATOR_VERSION, synthesize

    options = dict(parse_qsl(urlsplit(spec).query))
    try:
        findings, seed = int(options.pop("findings", "10000")), int(options.pop("seed", "0"))
    except ValueError:
        findings = 0
        seed = 0
    if findings < 1 or options:
        raise UserError(
            f"data.sources={spec}: wrong options. Fix: write synthetic://?findings=N&seed=S with whole numbers, N at "
            "least 1"
        )
    root = (cache_dir or cache_root()) / "synthetic"
    folder = root / f"v{GENERATOR_VERSION}-{findings}-{seed}"
    if not folder.is_dir():
        root.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=root, prefix=".generating-"))
        try:
            synthesize(temporary, findings=findings, seed=seed)
            temporary.replace(folder)  # in one step; it fails if another process wrote the folder in the meantime
        except OSError:
            if not folder.is_dir():
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    location = Location(str(folder))
    source = Files(location, location.files()[0], identity=f"synthetic-v{GENERATOR_VERSION}-{findings}-{seed}")
    source.spec = spec
    return source
