"""Files of every supported kind with numbered findings (``f0``, ``f1``, ...), and readers of a whole source."""

import gzip
import io
import json
import tarfile
from functools import partial

import pyarrow as pa
import zstandard
from pyarrow import parquet

from datamodules.sources import open_source, parse
from tests.helpers.findings_data import finding

gzip_bytes = partial(gzip.compress, mtime=0)  # without the time, which would differ between workers in test names
#: compression by suffix
COMPRESSIONS = {"": bytes, ".gz": gzip_bytes, ".zst": zstandard.ZstdCompressor().compress}


def batch_document(*numbers):
    """A batch document of findings in one category and one severity."""
    records = [finding(number, "medium", category="world_writable") for number in numbers]
    return {"metadata": {}, "data": {"findings": {"world_writable": {"medium": records}}, "correlations": []}}


def envelope(document, **changes):
    """The envelope of a document, given as an object or as bytes."""
    compressed = gzip_bytes(document if isinstance(document, bytes) else json.dumps(document).encode())
    return {"compressed": True, "compression_method": "gzip", "data": compressed.hex()} | changes


def shard(*numbers):
    """The bytes of an envelope of a batch document."""
    return json.dumps(envelope(batch_document(*numbers))).encode()


def json_lines(*numbers):
    """The bytes of JSON Lines, one finding per line."""
    return b"".join(json.dumps(finding(number)).encode() + b"\n" for number in numbers)


def parquet_table(*numbers, as_text=False, rows_per_group=4):
    """The bytes of a Parquet file, one finding per row; metadata as a struct or as JSON text."""
    records = [finding(number, tags=["filesystem"]) for number in numbers]
    for record in records:
        if as_text:
            record["metadata"] = json.dumps(record["metadata"])
    buffer = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(records), buffer, row_group_size=rows_per_group)
    return buffer.getvalue()


def tar(members, **options):
    """The bytes of a tar archive of files, given as bytes by name."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as file:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


GENERATION_REPORT = json.dumps({"generation_stats": {}, "batch_results": []}).encode()
#: members of an archive of five findings
FIVE_FINDINGS = {
    "d/b0.json": shard(0, 1), "d/generation_report.json": GENERATION_REPORT, "d/b1.json": shard(2),
    "d/b2.json": shard(3, 4),
}  # fmt: skip


def write(path, data):
    """Writes a file and its folder; returns the path as text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return str(path)


def read_source(source, start=(0, 0)):
    """Numbers of the findings and reasons of the quarantined records, in order."""
    numbers, reasons = [], []
    for raw in source.raw_documents(start):
        parsed = parse(raw)
        numbers += [int(record.id[1:]) for record in parsed.document.findings]
        reasons += [entry.reason for entry in parsed.quarantined]
    return numbers, reasons


def read_spec(spec, **options):
    """Opens and reads a whole source."""
    return read_source(open_source(spec, **options))
