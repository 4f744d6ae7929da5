"""Sources: an archive, a folder, a file, a remote URL or a Hugging Face dataset, as a stream of raw documents.

``open_source`` tells the kind by the content where it can, ``Source.raw_documents`` gives each document's bytes with
its place, and :func:`parse` unpacks and reads them. So several workers can walk one archive, each parsing its share.
Reading can begin at any place; an archive with a ``cache_dir`` is then not read from its start
(:mod:`datamodules.sources.seek_index`).

What can't be read comes out as a document whose ``parse`` quarantines it; only a source as a whole is a user's error.
Read and parsed from a ``.tar.gz`` of real envelopes: 20,000 findings/s and more on one core.
"""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import orjson
import pyarrow as pa

from datamodules.errors import UserError
from datamodules.sources.byte_stream import ByteStream, compression_of
from datamodules.sources.decompression import LIMITS, Limits
from datamodules.sources.field_coercion import InvalidRecord
from datamodules.sources.filesystem import File, Location, record_kind
from datamodules.sources.formats import Parsed, Quarantined, Reader
from datamodules.sources.huggingface import HuggingFace
from datamodules.sources.readers import Archive, Deferred, Files, RawDocument, Source
from datamodules.sources.tar_reader import BLOCK

__all__ = ["Parsed", "Quarantined", "RawDocument", "Source", "open_source", "parse"]

HEAD = 1 << 16  #: bytes by which a file's kind is told
CHECKED = 16  #: documents that are looked at before a source is believed to hold findings
CHECKED_BYTES = 8 << 20  #: a document larger than this is believed unseen
TRAINING = "give a batch document, JSON Lines, Parquet or a tar archive of these"


def open_source(
    spec: str, *, storage_options: dict[str, Any] | None = None, cache_dir: Path | None = None, limits: Limits = LIMITS
) -> Source:
    """Opens a source and looks at its first documents.

    Args:
        spec: a folder, an archive (``.tar``, ``.tar.gz``, ``.tar.zst``), a JSON, JSON Lines or Parquet file (also
            packed), a glob, an fsspec URL of any of these, ``hf://datasets/NAME?split=train``, or
            ``synthetic://?findings=N&seed=S``.
        storage_options: fsspec's options for a remote source.
        cache_dir: folder for what a pass learns (seek points) and for synthetic shards.
        limits: what members may unpack to.

    Raises:
        UserError: nothing there, nothing in it, or no findings in it.
    """
    if spec.startswith("synthetic://"):
        return _synthetic(spec, cache_dir)
    if spec.startswith("hf://datasets/"):
        source: Source = HuggingFace(spec)
    else:
        location = Location(spec, storage_options or {})
        files, single = location.files()
        if not files:
            raise UserError(f"source {spec}: no .json, .jsonl or .parquet file in it; {TRAINING}")
        source = _file_source(location, files[0], cache_dir, limits) if single else Files(location, files)
    _check(source, limits)
    return source


def parse(raw: RawDocument, limits: Limits = LIMITS) -> Parsed:
    """Reads a raw document; whatever is wrong with the data ends in ``quarantined``, never in an exception."""
    payload = raw.payload
    reader = Reader(raw.source, raw.member, raw.position, limits)
    collecting = gc.isenabled()
    gc.disable()  # records hold no cycles, and walking them again and again took a third of the time
    try:
        if isinstance(payload, InvalidRecord):
            raise payload
        if isinstance(payload, Deferred):
            payload = payload(limits)
        if isinstance(payload, bytes):
            reader.read_bytes(payload)
        elif isinstance(payload, pa.RecordBatch):
            reader.read_rows(payload.to_pylist())
        elif payload and isinstance(payload[0], bytes):
            reader.read_lines(payload)
        else:
            reader.read_rows(payload)
    except InvalidRecord as error:
        reader.refuse(error, None)
    except (pa.ArrowException, UnicodeDecodeError, OverflowError) as error:  # cells that Python can't hold
        reader.refuse(InvalidRecord("bad_table", str(error)), None)
    finally:
        if collecting:
            gc.enable()
    return reader.parsed


def _file_source(location: Location, file: File, cache_dir: Path | None, limits: Limits) -> Source:
    """Chooses how to read a single file by its first bytes, and by its name where they don't tell."""
    try:
        with location.open(file) as opened:
            head = opened.read(HEAD)
            if file.size > HEAD:
                opened.seek(-4, 2)  # a server that sends whole files only says so here
                opened.read(4)
        compression = compression_of(head)
        if compression:
            stream = ByteStream(lambda: location.open(file), compression)
            try:
                head = stream.read(HEAD)
            finally:
                stream.close()
    except OSError as error:
        raise UserError(
            f"source {location.spec}: can't be read ({error.strerror or error}); check its permissions, or fetch it "
            "first"
        ) from None
    except InvalidRecord as error:
        raise UserError(f"source {location.spec}: damaged from its start ({error}); fetch it again") from None
    if not head.strip():
        raise UserError(f"source {location.spec}: is empty; {TRAINING}")
    kind = _kind(head, file.path)
    if not kind:
        raise UserError(f"source {location.spec}: neither JSON nor Parquet nor a tar archive of these; {TRAINING}")
    if kind in ("tar", "lines"):
        return Archive(location, file, kind, compression, cache_dir, limits)
    return Files(location, [file], kind)


def _kind(head: bytes, name: str) -> str:
    """Tells what uncompressed data begin with ``head``: "tar", "parquet", "lines", "json" or ""."""
    if head.startswith(b"PAR1"):
        return "parquet"
    if head[257:262] == b"ustar" or (len(head) >= BLOCK and not head[:BLOCK].strip(b"\0")):
        return "tar"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    by_name = record_kind(name)
    if not text.startswith((b"{", b"[")):
        return by_name if by_name in ("json", "lines") else ""  # named so, and so quarantined with a reason
    first, _, rest = text.partition(b"\n")
    if not rest.strip():  # one line, or one so long that its end is not seen
        return "lines" if by_name == "lines" else "json"
    if by_name != "lines":
        return "lines" if _is_object(first) else "json"
    # under this name one good line among the first tells it from a document that is printed over many lines
    return "lines" if any(map(_is_object, text.splitlines())) or len(first.strip()) > 1 else "json"


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(orjson.loads(line), dict)
    except orjson.JSONDecodeError:
        return False


def _check(source: Source, limits: Limits) -> None:
    """Raises a UserError for a source without any usable document among its first ones."""
    reasons: list[str] = []
    seen = 0
    for raw in islice(source.raw_documents(), CHECKED):
        seen += 1
        size = raw.payload.file.size if isinstance(raw.payload, Deferred) else 0
        if size > CHECKED_BYTES or (isinstance(raw.payload, bytes) and len(raw.payload) > CHECKED_BYTES):
            return
        parsed = parse(raw, limits)
        if parsed.document.findings or parsed.document.correlations:
            return
        reasons += [f"{entry.reason} {entry.detail}".strip() for entry in parsed.quarantined]
    if any(reason.startswith("scanner_report") for reason in reasons):
        raise UserError(
            f"source {source.spec}: a scanner report, which `analyze` reads, has no answers to learn from; {TRAINING}"
        )
    if seen < CHECKED:
        raise UserError(f"source {source.spec}: holds no findings ({reasons[0] if reasons else 'empty'}); {TRAINING}")


def _synthetic(spec: str, cache_dir: Path | None) -> Source:
    """Generates shards once into the cache, and reads them like any other folder."""
    from datamodules.pretrained.locate import cache_root
    from datamodules.synthetic import GENERATOR_VERSION, synthesize

    options = dict(parse_qsl(urlsplit(spec).query))
    try:
        findings, seed = int(options.pop("findings", "10000")), int(options.pop("seed", "0"))
    except ValueError:
        findings = 0
        seed = 0
    if findings < 1 or options:
        raise UserError(f"source {spec}: write synthetic://?findings=N&seed=S with whole numbers, N at least 1")
    root = (cache_dir or cache_root()) / "synthetic"
    folder = root / f"v{GENERATOR_VERSION}-{findings}-{seed}"
    if not folder.is_dir():
        root.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=root, prefix=".making-"))
        try:
            synthesize(temporary, findings=findings, seed=seed)
            os.replace(temporary, folder)  # noqa: PTH105 - in one step, also where another process made it meanwhile
        except OSError:
            if not folder.is_dir():
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    location = Location(str(folder))
    source = Files(location, location.files()[0], identity=f"synthetic-v{GENERATOR_VERSION}-{findings}-{seed}")
    source.spec = spec
    return source
