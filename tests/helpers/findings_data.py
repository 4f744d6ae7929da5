"""Small findings, documents and examples, for the tests of the data pipeline."""

import io
import tarfile
from pathlib import Path

import numpy as np
import orjson

from datamodules.records import Finding
from datamodules.tokenization.chat_format import Example

SEVERITIES = ("info", "low", "medium", "high", "critical")
SCORES = {"info": 10.0, "low": 30.0, "medium": 50.0, "high": 80.0, "critical": 95.0}


def finding(number, severity=None, **changes):
    """A finding as it is in a file."""
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


def document(findings, correlations=()):
    """The bytes of a file of findings."""
    return orjson.dumps({"metadata": {}, "data": {"version": "1", "findings": findings, "correlations": correlations}})


def write_shard(folder: Path, findings, correlations=()) -> list[str]:
    """Writes a folder of one file of findings; returns it as a list of sources."""
    folder.mkdir(exist_ok=True)
    (folder / "shard.json").write_bytes(document(findings, correlations))
    return [str(folder)]


def write_folder(folder: Path, sizes, start=0) -> Path:
    """Writes one file per size; findings are numbered from ``start``."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, size in enumerate(sizes):
        shard = document([finding(n) for n in range(start, start + size)])
        (folder / f"batch_{index:03}.json").write_bytes(shard)
        start += size
    return folder


def write_archive(path: Path, sizes) -> Path:
    """Writes the same files as members of a gzip tar."""
    start = 0
    with tarfile.open(path, "w:gz") as archive:
        for index, size in enumerate(sizes):
            shard = document([finding(n) for n in range(start, start + size)])
            member = tarfile.TarInfo(f"massive_datasets/batch_{index:03}.json")
            member.size = len(shard)
            archive.addfile(member, io.BytesIO(shard))
            start += size
    return path


def parsed_finding(identity: str, kind: int = 0, **changes) -> Finding:
    """A parsed finding; findings of one kind have the same input."""
    fields = {
        "title": f"title {kind}", "description": "text", "category": "network", "severity": "low", "risk_score": 30.0,
        "base_severity_score": 30.0, "metadata": {"port": kind, "state": "LISTEN"},
    }  # fmt: skip
    return Finding(id=identity, **fields | changes)


def example(prompt=(1, 2), completion=(3,), *, prefix=0, key=0, input_key=None, **changes) -> Example:
    """A tokenized example."""
    fields = {"task": "risk", "severity": "low", "category": "network", "findings": 1} | changes
    return Example(
        prefix_length=prefix,
        prompt_ids=np.array(prompt, np.int32),
        completion_ids=np.array(completion, np.int32),
        key=key,
        input_key=key if input_key is None else input_key,
        **fields,
    )


def row_ids(batch):
    """The used tokens of each row of a batch: with packing "none" each row is one example."""
    rows = zip(batch.input_ids_BT, batch.segment_ids_BT, strict=True)
    return [tuple(ids[segments >= 0].tolist()) for ids, segments in rows if (segments >= 0).any()]


def all_row_ids(batches):
    """The used tokens of each row of several batches."""
    return [ids for batch in batches for ids in row_ids(batch)]
