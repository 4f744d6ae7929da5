"""Small batch documents with known findings, for the tests of the data module."""

import io
import tarfile
from pathlib import Path

import orjson

SEVERITIES = ("info", "low", "medium", "high", "critical")
SCORES = {"info": 10.0, "low": 30.0, "medium": 50.0, "high": 80.0, "critical": 95.0}


def finding(number, severity=None, **changes):
    severity = severity or SEVERITIES[number % 5]
    return {
        "id": f"f{number}",
        "title": f"T{number}",
        "severity": severity,
        "risk_score": SCORES[severity],
        "base_severity_score": SCORES[severity],
        "description": "d" * (number % 7),
        "metadata": {"pid": number},
        "category": ("processes", "network")[number % 2],
        "tags": [],
    } | changes


def document(findings):
    return orjson.dumps({"metadata": {}, "data": {"version": "1", "findings": findings, "correlations": []}})


def write_folder(folder: Path, sizes, start=0) -> Path:
    """One shard per size; findings are numbered through."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, size in enumerate(sizes):
        shard = document([finding(n) for n in range(start, start + size)])
        (folder / f"batch_{index:03}.json").write_bytes(shard)
        start += size
    return folder


def write_archive(path: Path, sizes) -> Path:
    """The same as a gzip tar."""
    start = 0
    with tarfile.open(path, "w:gz") as archive:
        for index, size in enumerate(sizes):
            shard = document([finding(n) for n in range(start, start + size)])
            member = tarfile.TarInfo(f"massive_datasets/batch_{index:03}.json")
            member.size = len(shard)
            archive.addfile(member, io.BytesIO(shard))
            start += size
    return path


def row_ids(batch):
    """The used tokens of each row of a batch: with packing "none" each is one example."""
    rows = zip(batch.input_ids_BT, batch.segment_ids_BT, strict=True)
    return [tuple(ids[segments >= 0].tolist()) for ids, segments in rows if (segments >= 0).any()]
